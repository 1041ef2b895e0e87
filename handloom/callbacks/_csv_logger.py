"""A table of epochs, as comma-separated values."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handloom._keras import keras
from handloom.callbacks._state import Stateful

_MISSING = "NA"

Row = Mapping[str, Any]


class CSVLogger(Stateful, keras.callbacks.Callback):
    """Writes a row of reported values for each epoch.

    Differences from `keras.callbacks.CSVLogger`: a value that is first reported in a later epoch gets a column (Keras
    drops it), for which the file is replaced atomically; appended rows follow the columns of the file (Keras orders
    them by itself); columns are in the order of the reports, and only reported values have one; arrays are written as
    `[1.0, 2.0]`; the directory is created; no file stays open between epochs. As with Keras, a value that an epoch does
    not report reads NA.

    Args:
        filename: The file.
        separator: The character between values.
        append: Whether to keep the rows of an existing file.
    """

    carries = ("rows",)

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False) -> None:
        super().__init__()
        self.filename, self.separator, self.append = Path(filename), separator, append
        self.rows = 0
        self._names: Sequence[str] = ()

    def on_train_begin(self, logs: Row | None = None) -> None:
        self.filename.parent.mkdir(parents=True, exist_ok=True)
        # A file that cannot be written is an error before training. Old rows go with the first new one.
        self.filename.open("a", encoding="utf-8").close()
        self.rows = len(self._read()[1]) if self.append else 0
        self._names = ()

    def on_epoch_end(self, epoch: int, logs: Row | None = None) -> None:
        row = {"epoch": epoch} | {name: _text(value) for name, value in (logs or {}).items()}
        if not row.keys() <= set(self._names):
            self._add_columns(row)
        self._write(self.filename, "a", [row])
        self.rows += 1

    def _add_columns(self, row: Row) -> None:
        """Replaces the file by one with the rows to keep, and a column for each value of a new row."""
        names, rows = self._read()
        kept = rows[: self.rows]
        self._names = list(dict.fromkeys(["epoch", *(names if kept else ()), *row]))
        new = self.filename.with_name(self.filename.name + ".new")
        self._write(new, "w", [dict(zip(self._names, self._names, strict=True)), *kept])
        os.replace(new, self.filename)

    def _read(self) -> tuple[Sequence[str], list[dict[str, str]]]:
        """The column names and the rows of the file."""
        if not self.filename.exists():
            return (), []
        with self.filename.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter=self.separator, restval=_MISSING)
            return reader.fieldnames or (), list(reader)

    def _write(self, path: Path, mode: str, rows: Sequence[Row]) -> None:
        with path.open(mode, encoding="utf-8", newline="") as file:
            form: Any = {"restval": _MISSING, "extrasaction": "ignore", "lineterminator": "\n"}
            csv.DictWriter(file, self._names, delimiter=self.separator, **form).writerows(rows)


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else np.asarray(value).tolist()
