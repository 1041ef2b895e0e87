"""A table of epochs, as comma-separated values."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from handloom._keras import keras
from handloom.callbacks._state import Stateful

_MISSING = "NA"

Row = Mapping[str, Any]


class CSVLogger(Stateful, keras.callbacks.Callback):
    """Writes a row of reported values for each epoch.

    As `keras.callbacks.CSVLogger`, but: a value that is first reported in a later epoch gets a column (Keras loses
    it), for which the file is rewritten at one stroke; rows are appended under the names that the file has (Keras
    writes them in an order of its own); columns are in the order of the reports, and only what was reported has one;
    arrays are written as `[1.0, 2.0]`; the directory is created; the file is closed after an exception too. A value
    that an epoch does not report reads NA, as with Keras.

    Args:
        filename: The file.
        separator: What stands between values; one character.
        append: Whether to keep the rows of a file that is there.
    """

    carries = ("rows",)

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False) -> None:
        super().__init__()
        self.filename, self.separator, self.append = Path(filename), separator, append
        self.rows = 0
        self._names: list[str] = []
        self._file: TextIO | None = None

    def on_train_begin(self, logs: Row | None = None) -> None:
        self.close()
        self.filename.parent.mkdir(parents=True, exist_ok=True)
        # A file that cannot be written is to be found now; rows that are not kept go with the first new one.
        self.filename.open("a", encoding="utf-8").close()
        self.rows = len(self._read()[1]) if self.append else 0

    def on_epoch_end(self, epoch: int, logs: Row | None = None) -> None:
        row = {"epoch": epoch} | {name: _text(value) for name, value in (logs or {}).items()}
        if self._file is None or not set(row) <= set(self._names):
            self._begin(row)
        assert self._file is not None
        self._writer(self._file).writerow(row)
        self._file.flush()
        self.rows += 1

    def on_train_end(self, logs: Row | None = None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; also called when training ends by an exception."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, row: Row) -> None:
        """Opens the file, with the rows that are to be kept in it and a column for all that a new row has."""
        self.close()
        names, rows = self._read()
        kept = rows[: self.rows]
        self._names = list(dict.fromkeys(["epoch", *(names if kept else ()), *row]))
        beside = self.filename.with_name(self.filename.name + ".new")
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(beside, self.filename)
        self._file = self.filename.open("a", encoding="utf-8", newline="")

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """The names and the rows of the file as it is."""
        if not self.filename.exists():
            return [], []
        with self.filename.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter=self.separator, restval=_MISSING)
            rows = list(reader)
            return list(reader.fieldnames or ()), rows

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(
            file, self._names, restval=_MISSING, delimiter=self.separator, extrasaction="ignore", lineterminator="\n"
        )


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else np.asarray(value).tolist()
