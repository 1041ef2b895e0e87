"""`tf.data` on any backend: TensorFlow saves the position of an iterator into files, which are read here."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILES = {"index": "at.index", "data": "at.data-00000-of-00001"}
"""The files that `tf.train.Checkpoint` writes under the name `at`."""


class TensorFlowData:
    """Reads a `tf.data.Dataset`; see `Reader` in `handloom/_data/sources/stream.py`.

    A state includes the buffers: that of a shuffle is as large as the examples in its buffer.
    """

    def __init__(self, data: Any) -> None:
        self._tf = sys.modules["tensorflow"]
        self._data = data
        self._iterator: Any = None
        self._exact: bool | None = None

    @property
    def exact(self) -> bool | None:
        """`False` with Python functions or random operations in the pipeline: TensorFlow cannot save these."""
        if self._exact is None and self._iterator is not None:
            self.state()
        return self._exact

    def begin(self) -> Iterator[Any]:
        self._iterator = iter(self._data)
        return iter(self._iterator)

    def state(self) -> dict[str, bytes] | None:
        self._exact = False
        with tempfile.TemporaryDirectory() as directory:
            try:
                self._tf.train.Checkpoint(iterator=self._iterator).write(f"{directory}/at")
            except self._tf.errors.OpError:
                return None
            self._exact = True
            return {name: (Path(directory) / file).read_bytes() for name, file in _FILES.items()}

    def resume(self, state: dict[str, bytes], batch: int | None) -> Iterator[Any] | None:
        iterator = iter(self._data)
        with tempfile.TemporaryDirectory() as directory:
            for name, file in _FILES.items():
                (Path(directory) / file).write_bytes(state[name])
            self._tf.train.Checkpoint(iterator=iterator).read(f"{directory}/at").assert_consumed()
        self._iterator = iterator
        # Read between two passes too: it restores the generator from which a shuffle draws its next order.
        return None if batch is None else iterator


def tensorflow_data(data: Any) -> TensorFlowData | None:
    """The reader of a `tf.data.Dataset`; `None` for any other data."""
    tf = sys.modules.get("tensorflow")
    return TensorFlowData(data) if tf is not None and isinstance(data, tf.data.Dataset) else None
