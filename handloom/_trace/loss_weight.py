"""The weight of a step's batch, by which gradient accumulation weights its gradients."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

from handloom._keras import Tensor

Weight: TypeAlias = "Tensor | float"
"""A number, or a scalar tensor; `SUM` for a loss that is a sum."""

SUM = "sum"


class _Here(threading.local):
    weight: Any = 1.0


_here = _Here()


@contextlib.contextmanager
def step_weight(weight: Weight) -> Iterator[None]:
    """Sets the weight of gradients for a block: the examples in the batch, or the denominator of the loss."""
    before, _here.weight = _here.weight, weight
    try:
        yield
    finally:
        _here.weight = before


def weight_of_step() -> Weight:
    """The weight of gradients in the caller's block; 1 if none was set."""
    return _here.weight
