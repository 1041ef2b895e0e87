"""Hugging Face data sets: tables, whose rows are cut into batches, and streams, which yield batches of columns."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from handloom._data.sources.base import Batch, BatchCheck, Cut, Source, has
from handloom._data.sources.stream import ByLoader
from handloom._interop.hugging_face import forgets_a_buffer
from handloom.errors import DataError


def is_table(data: Any) -> bool:
    """Whether data is a `datasets.Dataset`."""
    return has(data, "column_names", "features", "format", "with_format", "__getitem__")


def is_stream_of_columns(data: Any) -> bool:
    """Whether data is a `datasets.IterableDataset`."""
    return has(data, "column_names", "features", "state_dict", "load_state_dict", "set_epoch")


class Table(Source):
    """Rows by their numbers. Any position is restored at once; only the rows of a batch are read.

    Batches are dicts of columns: NumPy arrays, unless the data set has another format.
    """

    name = "the Dataset"

    def __init__(self, data: Any, batch_size: int, shuffle: bool, drop_remainder: bool) -> None:
        self._data = data if data.format["type"] else data.with_format("numpy")
        self._cut = Cut(len(data), batch_size, shuffle, drop_remainder)
        self.length = self._cut.length

    def batches(self, epoch: int, start: int, check: BatchCheck | None = None) -> Iterator[Batch]:
        for chosen in self._cut.batches(self.seed, epoch, start):
            yield self._as_batch(self._data[chosen], check)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self._cut.fingerprint() | {"columns": str(self._data.features)}


class Columns(ByLoader):
    """Reads a stream. Its order depends on the epoch, whose number it is given."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.exact = not forgets_a_buffer(data)

    def begin(self) -> Iterator[Any]:
        self._data.load_state_dict({})  # Otherwise it would begin at the position that was loaded last.
        return map(_columns, self._data)

    def resume(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        if batch is None:
            return None
        self._data.load_state_dict(state)
        return map(_columns, self._data)


def _columns(batch: Any) -> dict[str, Any]:
    """A batch of a stream, whose columns are lists unless the stream has a format, as arrays."""
    columns = {name: _array(name, column) if isinstance(column, list) else column for name, column in batch.items()}
    single = [name for name, column in columns.items() if not len(getattr(column, "shape", ()))]
    if single:
        raise DataError(
            f"HL429: The IterableDataset gives single examples: {single[0]!r} is one value, not a column.",
            fix="Make it give batches: dataset.batch(32).",
        )
    return columns


def _array(name: str, column: list[Any]) -> np.ndarray:
    try:
        return np.asarray(column)
    except ValueError as error:
        raise DataError(f"HL430: Rows of column {name!r} differ in length.", fix="Pad with dataset.map().") from error
