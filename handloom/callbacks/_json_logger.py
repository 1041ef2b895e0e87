"""The events of a run as JSON, one object a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from handloom._util.every import Every
from handloom._util.findings import warn
from handloom.callbacks._event_reader import Event, EventReader

VERSION = 1


class JSONLogger(EventReader):
    """Writes the events of a run as JSON lines, each appended to a file when it happens.

    A line has the attributes of an `Event`, with its data among them; that of `run_begin` also has the `version` of the
    format, 1. Numbers that JSON lacks are written as the strings "NaN", "Infinity" and "-Infinity".
    `handloom.report.read_events` reads the file, and leaves out steps that a resumed run repeated.

    A full disk does not end the training: it gives a warning, and no further lines are written.

    Args:
        path: The file. Its directory is created.
        every: When to write the values so far, within epochs; `None` for never.
    """

    def __init__(self, path: str | Path, every: Every | None = None) -> None:
        super().__init__(every)
        self._path = Path(path)
        self._file: BinaryIO | None = None
        self._is_full = False

    def read(self, event: Event) -> None:
        """Appends an event."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._is_full = _opened(self._path), False
        if self._is_full:
            return
        try:
            _append(self._file, _line(event))
        except OSError as error:
            self._is_full = True  # Set before the warning, which is an event, too.
            warn(
                f"HL711: An event could not be written to {self._path}: {error.strerror}.",
                "Training continues; this event and those after it are not in the file.",
                "Free space on the disk.",
            )

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _opened(path: Path) -> BinaryIO:
    """A file to append lines to. If its last line is incomplete, it is ended first."""
    file = path.open("ab+", buffering=0)
    if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
        file.write(b"\n")
    return file


def _append(file: BinaryIO, line: bytes) -> None:
    while line:  # A disk may take a part of it before it is full.
        line = line[file.write(line) :]


def _line(event: Event) -> bytes:
    line: dict[str, Any] = {name: getattr(event, name) for name in ("kind", "epoch", "step", "batch")}
    line |= {name: round(getattr(event, name), 6) for name in ("seconds", "time")}
    if event.kind == "run_begin":
        line["version"] = VERSION
    return (json.dumps(_plain(line | dict(event.data)), allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """A value as JSON values."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
