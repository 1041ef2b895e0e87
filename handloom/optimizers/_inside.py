"""What an optimizer is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def inside(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and those that it wraps or names, outermost first."""
    yield optimizer
    for inner in getattr(optimizer, "by_name", {}).values():
        yield from inside(inner)
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        yield from inside(inner)
