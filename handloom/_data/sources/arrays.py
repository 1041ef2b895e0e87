"""Arrays, cut into batches."""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optree

from handloom._data.sources.base import Batch, BatchCheck, Cut, Source
from handloom._data.sources.leaves import check_range, host_array, is_mapped, place
from handloom.backends import backend
from handloom.errors import DataError

_SAMPLE = 1024
"""The number of values of an array that its fingerprint includes."""


class Arrays(Source):
    """Arrays, sliced. Any position is restored at once; arrays mapped from files are read batch by batch."""

    name = "arrays"

    def __init__(self, data: Any, batch_size: int, shuffle: bool, drop_remainder: bool) -> None:
        self._paths, leaves, self._structure = optree.tree_flatten_with_path(data)
        self._arrays = [_read_only(host_array(leaf, path)) for path, leaf in zip(self._paths, leaves, strict=True)]
        self._named = dict(zip(map(place, self._paths), self._arrays, strict=True))
        self._cut = Cut(_common_length(self._named), batch_size, shuffle, drop_remainder)
        self.length, self.whole = self._cut.length, self._structure.unflatten(self._arrays)
        samples = [array[:1] for array in self._arrays]
        self._are_tensors = all(backend.to_tensor(sample) is sample for sample in samples)
        self._mapped = [index for index, array in enumerate(self._arrays) if is_mapped(array)]

    def batches(self, epoch: int, start: int, check: BatchCheck | None = None) -> Iterator[Batch]:
        arrays, unflatten = self._arrays, self._structure.unflatten
        for chosen in self._cut.batches(self.seed, epoch, start):
            leaves = [array[chosen] for array in arrays]
            for index in self._mapped:  # Other arrays were checked as a whole.
                check_range(leaves[index], self._paths[index])
            if check is not None:
                check(unflatten(leaves))
            yield unflatten(leaves if self._are_tensors else map(backend.to_tensor, leaves))

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self._cut.fingerprint() | self._contents

    @functools.cached_property
    def _contents(self) -> dict[str, str]:
        kinds = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in self._named.items()}
        return kinds | {f"values of {name}": _digest(array) for name, array in self._named.items()}


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to. A backend whose tensors share memory with arrays then copies each batch."""
    view = array.view()
    view.flags.writeable = False
    return view


def _digest(array: np.ndarray) -> str:
    """A hash of evenly spaced values, from the first to the last."""
    numbers = np.linspace(0, array.size - 1, min(array.size, _SAMPLE)).astype(np.int64)
    sample = array[np.unravel_index(numbers, array.shape)]
    return hashlib.sha256(np.ascontiguousarray(sample).tobytes()).hexdigest()[:16]


def _common_length(arrays: Mapping[str, np.ndarray]) -> int:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"HL412: All arrays must have the same number of examples (their first axis); {sizes}.")
    return next(iter(lengths.values()))
