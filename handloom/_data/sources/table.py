"""Hugging Face's data sets: tables, whose rows are cut into batches, and streams, which give batches of columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from handloom._data.sources.base import Batch, Cut, Look, Source
from handloom._interop.hugging_face import forgets_a_buffer
from handloom.errors import DataError


def is_table(data: Any) -> bool:
    """Whether data is a `datasets.Dataset`."""
    return _has(data, "column_names", "features", "format", "with_format", "__getitem__")


def is_stream_of_columns(data: Any) -> bool:
    """Whether data is a `datasets.IterableDataset`."""
    return _has(data, "column_names", "features", "state_dict", "load_state_dict", "set_epoch")


def _has(data: Any, *names: str) -> bool:
    return all(hasattr(data, name) for name in names)


class Table(Source):
    """Rows by their numbers. Any position is reached at once; only the rows of a batch are read.

    Batches are dicts of columns: NumPy arrays, unless the data set has another format set.
    """

    name = "the Dataset"

    def __init__(self, data: Any, batch_size: int, shuffle: bool, drop_remainder: bool) -> None:
        if not len(data):
            raise DataError("HL428: The data is empty: the Dataset has no rows.")
        self._data = data if data.format["type"] else data.with_format("numpy")
        self._cut = Cut(len(data), batch_size, shuffle, drop_remainder)
        self.length = self._cut.length

    def batches(self, epoch: int, start: int, look: Look | None = None) -> Iterator[Batch]:
        for chosen in self._cut.batches(self.seed, epoch, start):
            yield self._as_batch(self._data[chosen], look)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self._cut.fingerprint() | {"columns": str(self._data.features)}


class Columns:
    """Reads a stream; see `Reader`. Its order follows from the epoch, of which it is told."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.exact = not forgets_a_buffer(data)

    def begin(self) -> Iterator[Any]:
        self._data.load_state_dict({})  # It would begin again where it once was told to.
        return map(_columns, self._data)

    def state(self) -> Any:
        return self._data.state_dict()

    def go_on(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        if batch is None:
            return None
        self._data.load_state_dict(state)
        return map(_columns, self._data)


def _columns(batch: Any) -> dict[str, Any]:
    """A batch of a stream: what are lists, unless a format is set, as arrays."""
    columns = {name: _array(name, column) if isinstance(column, list) else column for name, column in batch.items()}
    single = [name for name, column in columns.items() if not len(getattr(column, "shape", ()))]
    if single:
        raise DataError(
            f"HL429: The IterableDataset gives single examples ({single[0]!r} is no column but one value). Have it "
            "give batches: dataset.batch(32).",
        )
    return columns


def _array(name: str, column: list[Any]) -> np.ndarray:
    try:
        return np.asarray(column)
    except ValueError as error:
        raise DataError(
            f"HL430: The rows of the column {name!r} differ in length; pad them, with dataset.map(...)."
        ) from error
