"""`keras.ops.cond` on JAX, with assignments of variables in its branches.

Keras passes the branches to `jax.lax.cond`, which loses the values that they assign. Here the assigned values become
results of the branch, and are assigned again outside.

Internals used: `keras.src.backend.jax.core.cond` (replaced while a user's function runs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from keras.src.backend.jax import core

from handloom._keras import Tensor, Variable, keras
from handloom._util.patch import Patch
from handloom.backends.scope import Scope


def cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    """`keras.ops.cond`, whose functions may assign variables."""
    pred = pred.value if isinstance(pred, keras.Variable) else pred
    if not isinstance(pred, jax.core.Tracer):
        return true_fn() if pred else false_fn()
    branches = [_Branch(true_fn), _Branch(false_fn)]
    written = list({id(variable): variable for branch in branches for variable in branch.written}.values())
    result, news = jax.lax.cond(pred, *(branch.giving(written) for branch in branches))
    for variable, value in zip(written, news, strict=True):
        variable.assign(value)
    return result


class _Branch:
    """A function, and the variables that it assigns."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        with Scope() as scope:
            jax.eval_shape(lambda: [fn()])  # A new function each time: JAX does not run a known one again.
        self.written = scope.written

    def giving(self, variables: Sequence[Variable]) -> Callable[[], tuple[Any, list[Tensor]]]:
        """The same function, which also returns the final values of these variables."""

        def run() -> tuple[Any, list[Tensor]]:
            with Scope() as scope:
                result = self._fn()
            return result, [scope.get_current_value(variable) for variable in variables]

        return run


assignments_in_branches = Patch((core, "cond", lambda _: cond))
"""Inside, the branches of `keras.ops.cond` can assign variables."""
