"""A log that programs can read: one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from handloom._every import Every, every
from handloom._keras import keras
from handloom._progress import Progress


class JSONLogger(keras.callbacks.Callback):
    """Writes what is reported as JSON lines.

    A line holds `epoch` (from 0), `step` (steps taken in this run), `seconds` (since it began) and the reported
    values. Numbers that JSON does not have are written as the strings "NaN", "Infinity" and "-Infinity".

    Args:
        path: The file; lines are appended to it. Its directory is created.
        every: When to write: at the end of epochs, or, with `hl.every(steps=...)`, also within them (then of the
            values so far).
    """

    def __init__(self, path: str | Path, every: Every = every(epochs=1)) -> None:
        super().__init__()
        self._path, self._every = Path(path), every
        self._progress = Progress()
        self._file: TextIO | None = None
        self._written = time.perf_counter()

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self._progress = Progress()
        self._begun = self._written = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._progress.advance()
        if self._every.epochs is None and self._every.due(self._progress, time.perf_counter() - self._written):
            self._write(self._progress.epoch, logs)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._progress.epoch, self._progress.batch = epoch, 0

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._progress.end_epoch()
        if self._every.epochs is None or self._every.due(self._progress):
            self._write(epoch, logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; also called when training ends by an exception."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, epoch: int, logs: Mapping[str, Any] | None) -> None:
        assert self._file is not None
        self._written = time.perf_counter()
        where = {"epoch": epoch, "step": self._progress.step, "seconds": round(self._written - self._begun, 3)}
        line = where | {name: _plain(value) for name, value in (logs or {}).items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, str):  # Which a callback of the user's may have added.
        return value
    if np.ndim(value):
        return [_plain(item) for item in np.asarray(value).tolist()]
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
