"""A part of an array."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a variable that one process holds.

    Attributes:
        offset: Where its first element stands in the variable, one index an axis.
        value: Its values, in host memory; not to be written to.
    """

    offset: tuple[int, ...]
    value: np.ndarray

    @classmethod
    def whole(cls, array: np.ndarray) -> Shard:
        """All of an array."""
        return cls((0,) * array.ndim, array)
