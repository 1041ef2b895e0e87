"""Arrays, cut into batches."""

import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optree

from handloom._data.sources.base import Batch, BatchCheck, Cut, Source
from handloom._data.sources.leaves import (
    Path,
    as_tensor,
    check_any_held,
    check_range,
    host_array,
    is_mapped,
    place,
    unheld,
)
from handloom._interop.tensors import rows_of, stored_values
from handloom._trace.left_out import is_words
from handloom.backends import backend
from handloom.errors import DataError

_SAMPLE = 1024
"""The number of values of an array that its fingerprint includes."""


class Arrays(Source):
    """Arrays, sliced. Any position is restored at once; arrays mapped from files are read batch by batch."""

    name = "arrays"

    def __init__(self, data: Any, batch_size: int, shuffle: bool, drop_remainder: bool) -> None:
        self._paths, leaves, self._structure = optree.tree_flatten_with_path(data, is_leaf=is_words)
        self._arrays = [_read_only(host_array(leaf, path)) for path, leaf in zip(self._paths, leaves, strict=True)]
        self._rows = [_rows(array) for array in self._arrays]
        self._named = dict(zip(map(place, self._paths), self._arrays, strict=True))
        self._cut = Cut(_common_length(self._named), batch_size, shuffle, drop_remainder)
        self.length, self.whole = self._cut.length, self._structure.unflatten(self._arrays)
        self._convert = [_conversion(array, path) for array, path in zip(self._arrays, self._paths, strict=True)]
        samples = [rows(slice(1)) for rows in self._rows]
        check_any_held(self._converted(samples))
        self._are_tensors = all(map(operator.is_, self._converted(samples), samples))
        self._mapped = [index for index, array in enumerate(self._arrays) if is_mapped(array)]

    def batches(self, epoch: int, start: int, check: BatchCheck | None = None) -> Iterator[Batch]:
        all_rows, unflatten = self._rows, self._structure.unflatten
        for chosen in self._cut.batches(self.seed, epoch, start):
            leaves = [rows(chosen) for rows in all_rows]
            for index in self._mapped:  # Other arrays were checked as a whole.
                check_range(leaves[index], self._paths[index])
            if check is not None:
                check(unflatten(leaves))
            yield unflatten(leaves if self._are_tensors else self._converted(leaves))

    def _converted(self, leaves: Sequence[Any]) -> list[Any]:
        return [convert(leaf) for convert, leaf in zip(self._convert, leaves, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self._cut.fingerprint() | self._contents

    @functools.cached_property
    def _contents(self) -> dict[str, str]:
        kinds = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in self._named.items()}
        return kinds | {f"values of {name}": _digest(array) for name, array in self._named.items()}


def _rows(array: Any) -> Callable[[Any], Any]:
    """Takes a slice or the numbers of rows; returns these."""
    return array.__getitem__ if isinstance(array, np.ndarray) else functools.partial(rows_of, array)


def _conversion(array: Any, path: Path) -> Callable[[Any], Any]:
    """Converts rows to a tensor."""
    if not isinstance(array, np.ndarray):
        return functools.partial(as_tensor, path=path)
    left_out = unheld(array, path)
    return backend.to_tensor if left_out is None else lambda _: left_out


def _read_only(array: Any) -> Any:
    """A view that cannot be written to. A backend whose tensors share memory with arrays then copies each batch."""
    if not isinstance(array, np.ndarray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _digest(array: Any) -> str:
    """A hash of evenly spaced values, from the first to the last."""
    array = array if isinstance(array, np.ndarray) else stored_values(array)
    numbers = np.linspace(0, array.size - 1, min(array.size, _SAMPLE)).astype(np.int64)
    sample = array[np.unravel_index(numbers, array.shape)]
    if array.dtype.hasobject:  # Whose bytes are addresses.
        sample = sample.astype(str)
    return hashlib.sha256(np.ascontiguousarray(sample).tobytes()).hexdigest()[:16]


def _common_length(arrays: Mapping[str, Any]) -> int:
    lengths = {name: int(array.shape[0]) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"HL412: All arrays must have the same number of examples (their first axis); {sizes}.")
    return next(iter(lengths.values()))
