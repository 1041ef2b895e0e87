"""`tf.data`, whichever library is the backend: its iterators save where they stand into files, which are read here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILES = {"index": "at.index", "data": "at.data-00000-of-00001"}
"""What `tf.train.Checkpoint` writes under the name `at`."""


class TensorFlowData:
    """Reads a `tf.data.Dataset`; see `Reader` in `handloom/_data/sources/stream.py`.

    Buffers are part of a state: that of a shuffle is as large as what the shuffle holds.
    """

    def __init__(self, data: Any) -> None:
        self._tf = sys.modules["tensorflow"]
        self._data = data
        self._iterator: Any = None
        self._exact: bool | None = None

    @property
    def exact(self) -> bool | None:
        """No with Python functions in the pipeline, or random operations: TensorFlow refuses to save these."""
        if self._exact is None and self._iterator is not None:
            self._exact = self._saved() is not None
        return self._exact

    def begin(self) -> Iterator[Any]:
        self._iterator = iter(self._data)
        return iter(self._iterator)

    def state(self) -> dict[str, bytes] | None:
        saved = self._saved()
        self._exact = saved is not None
        return saved

    def go_on(self, state: dict[str, bytes], batch: int | None) -> Iterator[Any] | None:
        iterator = iter(self._data)
        with tempfile.TemporaryDirectory() as directory:
            for name, file in _FILES.items():
                (Path(directory) / file).write_bytes(state[name])
            self._checkpoint(iterator).read(f"{directory}/at").assert_consumed()
        self._iterator = iterator
        # Between passes, too: what a shuffle draws its next order from stands where it stood.
        return None if batch is None else iterator

    def _saved(self) -> dict[str, bytes] | None:
        """What the iterator says of itself, `None` if it can't."""
        with tempfile.TemporaryDirectory() as directory:
            try:
                self._checkpoint(self._iterator).write(f"{directory}/at")
            except self._tf.errors.OpError:
                return None
            return {name: (Path(directory) / file).read_bytes() for name, file in _FILES.items()}

    def _checkpoint(self, iterator: Any) -> Any:
        return self._tf.train.Checkpoint(iterator=iterator)


def tensorflow_data(data: Any) -> TensorFlowData | None:
    """What reads data that is a `tf.data.Dataset`."""
    tf = sys.modules.get("tensorflow")
    return TensorFlowData(data) if tf is not None and isinstance(data, tf.data.Dataset) else None
