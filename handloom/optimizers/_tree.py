"""What an optimizer is made of."""

from __future__ import annotations

from collections.abc import Iterator

from handloom._keras import keras
from handloom.optimizers._named import NamedOptimizers


def inside(optimizer: keras.Optimizer | None) -> Iterator[keras.Optimizer]:
    """An optimizer, and those that it wraps or names, outermost first; nothing for `None`."""
    if optimizer is None:
        return
    yield optimizer
    if isinstance(optimizer, NamedOptimizers):
        for inner in optimizer.values():
            yield from inside(inner)
    elif isinstance(getattr(optimizer, "inner_optimizer", None), keras.Optimizer):
        yield from inside(optimizer.inner_optimizer)


def named_inside(optimizer: keras.Optimizer | None) -> Iterator[NamedOptimizers]:
    """The optimizers by name among them, outermost first."""
    yield from (part for part in inside(optimizer) if isinstance(part, NamedOptimizers))
