"""A part of an array."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a variable that one process holds.

    Attributes:
        offset: The index of its first element in the variable, one number an axis.
        value: Its values, in host memory. Do not write to them.
    """

    offset: tuple[int, ...]
    value: np.ndarray

    @classmethod
    def whole(cls, array: np.ndarray) -> Self:
        """The shard that is the whole array."""
        return cls((0,) * array.ndim, array)


Shards: TypeAlias = Mapping[str, Sequence[Shard]]
"""The shards of arrays, by the names of the arrays."""
