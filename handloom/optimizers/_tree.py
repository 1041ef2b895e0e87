"""Trees of optimizers: a wrapper contains one optimizer, `NamedOptimizers` contains several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from handloom._keras import Tensor, keras
from handloom.errors import OptimizerError

Gradients: TypeAlias = "list[Tensor | None]"
"""One gradient per variable; `None` if the variable does not reach the loss."""


def children(optimizer: Any) -> list[keras.Optimizer]:
    """The optimizers directly inside another, which may come from any library."""
    found = [*getattr(optimizer, "optimizers", ()), getattr(optimizer, "inner_optimizer", None)]
    return [child for child in found if isinstance(child, keras.Optimizer)]


def inside(optimizer: Any, kind: type = keras.Optimizer) -> Iterator[Any]:
    """The optimizers of a kind in a tree, from its root to its leaves; none in `None`."""
    if isinstance(optimizer, kind):
        yield optimizer
    for child in children(optimizer):
        yield from inside(child, kind)


def check_options(optimizer: Any) -> None:
    """Checks the options of every optimizer in a tree that Keras accepts and then ignores.

    Raises:
        OptimizerError: A limit for clipping is not positive, or gradients are to be accumulated over 0 steps.
    """
    for part in inside(optimizer):
        kind = type(part).__name__
        for name in ("clipvalue", "clipnorm", "global_clipnorm"):
            limit = getattr(part, name)
            if limit is not None and not limit > 0:
                raise OptimizerError(
                    f"HL325: {kind} has {name}={limit!r}: a limit for clipping is a positive number.",
                    fix=f"Pass a positive limit, such as {name}=1.0, or leave it out to clip nothing.",
                )
        if part.gradient_accumulation_steps == 0:
            raise OptimizerError(
                f"HL326: {kind} has gradient_accumulation_steps=0: an update accumulates 2 steps or more.",
                fix="To update on every step, leave it out.",
            )


def named_inside(optimizer: Any) -> Iterator[Any]:
    """The optimizers by name in a tree."""
    return (part for part in inside(optimizer) if hasattr(part, "owners"))
