"""Arrays, cut into batches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optree

from handloom._data.sources.base import Batch, Cut, Look, Source
from handloom._data.sources.leaves import check_range, host_array, is_mapped, place
from handloom.backends import backend
from handloom.errors import DataError

_SAMPLE = 1024
"""How many values of an array stand for all, in a fingerprint."""


class Arrays(Source):
    """Arrays, sliced. Any position is reached at once; arrays mapped from files are read batch by batch."""

    name = "arrays"

    def __init__(self, data: Any, batch_size: int, shuffle: bool, drop_remainder: bool) -> None:
        self._paths, leaves, self._structure = optree.tree_flatten_with_path(data)
        self._arrays = [host_array(leaf, path) for path, leaf in zip(self._paths, leaves, strict=True)]
        self._arrays = list(map(_read_only, self._arrays))
        self._cut = Cut(_common_length(self._arrays, self._paths), batch_size, shuffle, drop_remainder)
        self.length = self._cut.length
        samples = [array[:1] for array in self._arrays]
        self._as_they_are = all(backend.to_tensor(sample) is sample for sample in samples)
        # What was not looked at as a whole.
        self._mapped = [index for index, array in enumerate(self._arrays) if is_mapped(array)]

    @property
    def whole(self) -> Any:
        return self._structure.unflatten(self._arrays)

    def batches(self, epoch: int, start: int, look: Look | None = None) -> Iterator[Batch]:
        arrays, unflatten = self._arrays, self._structure.unflatten
        for chosen in self._cut.batches(self.seed, epoch, start):
            leaves = [array[chosen] for array in arrays]
            for index in self._mapped:
                check_range(leaves[index], self._paths[index])
            if look is not None:
                look(unflatten(leaves))
            yield unflatten(leaves if self._as_they_are else map(backend.to_tensor, leaves))

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self._cut.fingerprint() | self._contents

    @functools.cached_property
    def _contents(self) -> dict[str, str]:
        named = {place(path): array for path, array in zip(self._paths, self._arrays, strict=True)}
        kinds = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in named.items()}
        return kinds | {f"values of {name}": _digest(array) for name, array in named.items()}


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that a step cannot write to: where tensors share memory with arrays, its backend then copies batches."""
    view = array.view()
    view.flags.writeable = False
    return view


def _digest(array: np.ndarray) -> str:
    """A hash of values that stand at equal distances, from the first to the last."""
    numbers = np.linspace(0, array.size - 1, min(array.size, _SAMPLE)).astype(np.int64)
    sample = array[np.unravel_index(numbers, array.shape)]
    return hashlib.sha256(np.ascontiguousarray(sample).tobytes()).hexdigest()[:16]


def _common_length(arrays: Sequence[np.ndarray], paths: Sequence[Sequence[Any]]) -> int:
    lengths = {place(path): len(array) for path, array in zip(paths, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"HL412: All arrays must have the same number of examples (their first axis); {sizes}.")
    count = next(iter(lengths.values()))
    if not count:
        raise DataError("HL413: The data is empty: its arrays have no examples (their first axis is 0 long).")
    return count
