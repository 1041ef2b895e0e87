"""`keras.ops.cond` on JAX, with assignments of variables in its branches.

Keras passes the branches to `jax.lax.cond`, which loses the values that they assign. Here the assigned values become
results of the branch, and are assigned again outside.

Internals used: `cond` of `core` (see `_keras.py`; replaced while a user's function runs).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from handloom._keras import Tensor, Variable, holders_of_core, keras
from handloom._util.patch import Patch
from handloom.backends.scope import Scope


def cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    """`keras.ops.cond`, whose functions may assign variables."""
    pred = pred.value if isinstance(pred, keras.Variable) else pred
    if not isinstance(pred, jax.core.Tracer):
        return true_fn() if pred else false_fn()
    written = list({id(variable): variable for fn in (true_fn, false_fn) for variable in _assigned_by(fn)}.values())
    result, news = jax.lax.cond(pred, _returning(written, true_fn), _returning(written, false_fn))
    for variable, value in zip(written, news, strict=True):
        variable.assign(value)
    return result


def _assigned_by(fn: Callable[[], Any]) -> list[Variable]:
    """The variables that a branch assigns."""
    with Scope() as scope:
        jax.eval_shape(lambda: [fn()])  # A new function each time: JAX does not run a known one again.
    return list(scope.written)


def _returning(variables: Sequence[Variable], fn: Callable[[], Any]) -> Callable[[], tuple[Any, list[Tensor]]]:
    """The same branch, which also returns the final values of these variables."""

    def run() -> tuple[Any, list[Tensor]]:
        with Scope() as scope:
            result = fn()
        return result, [scope.get_current_value(variable) for variable in variables]

    return run


assignments_in_branches = Patch(*((holder, "cond", lambda _: cond) for holder in holders_of_core))
"""Inside, the branches of `keras.ops.cond` can assign variables."""
