"""A log that programs can read: one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from handloom._util.every import Every, every
from handloom.callbacks._periodic import Periodic


class JSONLogger(Periodic):
    """Writes what is reported as JSON lines.

    A line holds `epoch` (from 0), `step` (steps taken in this run), `seconds` (since it began) and the reported
    values. Numbers that JSON does not have are written as the strings "NaN", "Infinity" and "-Infinity".

    Args:
        path: The file; lines are appended to it. Its directory is created.
        every: When to write: at the end of epochs, or, with `hl.every(steps=...)`, also within them (then of the
            values so far).
    """

    def __init__(self, path: str | Path, every: Every = every(epochs=1)) -> None:
        super().__init__(every)
        self._path = Path(path)
        self._file: TextIO | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self._begun = time.perf_counter()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.close()

    def begin_anew(self) -> None:
        """Puts away what is in the file, of a run of which nothing else is left, as a file with the ending `.old`."""
        assert self._file is not None
        if self._path.stat().st_size:
            self._file.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.old"))
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file; also called when training ends by an exception."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """What the callback carries between hooks, as JSON values."""
        seconds = time.perf_counter() - self._begun
        return super().state() | {"seconds": seconds, "bytes": self._path.stat().st_size}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there, without the lines written since; to be called after `on_train_begin`."""
        super().restore(state)
        if self._file is not None and self._path.stat().st_size > state["bytes"]:
            self._file.truncate(state["bytes"])
        self._begun = time.perf_counter() - state["seconds"]

    def within_epoch(self, logs: Mapping[str, Any]) -> None:
        self._write(self.progress.epoch, logs)

    def end_of_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        self._write(epoch, logs)

    def _write(self, epoch: int, logs: Mapping[str, Any]) -> None:
        seconds = round(time.perf_counter() - self._begun, 3)
        line = {"epoch": epoch, "step": self.progress.step, "seconds": seconds}
        self.write(line | {name: _plain(value) for name, value in logs.items()})

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes another line, while training runs.

        Args:
            line: JSON values by name.
        """
        assert self._file is not None
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
