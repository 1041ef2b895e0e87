"""How much a step's batch counts: what accumulated gradients are weighted by."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

from handloom._keras import Tensor

Weight: TypeAlias = "Tensor | float"
"""A number, or a scalar tensor; `SUM` for a loss that is divided by nothing."""

SUM = "sum"


class _Here(threading.local):
    weight: Any = 1.0


_here = _Here()


@contextlib.contextmanager
def step_weight(weight: Weight) -> Iterator[None]:
    """Within, a gradient counts this much: the examples in the batch, or the denominator of its loss."""
    before, _here.weight = _here.weight, weight
    try:
        yield
    finally:
        _here.weight = before


def weight_of_step() -> Weight:
    """How much a gradient counts here; 1 where nobody said."""
    return _here.weight
