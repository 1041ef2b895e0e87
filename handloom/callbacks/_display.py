"""What a person sees while training runs: a bar in a terminal, or a line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from handloom._keras import keras
from handloom.callbacks._state import Stateful
from handloom.errors import ArgumentError

_REFRESH_SECONDS = 0.1


def progress_display(verbose: str | int) -> list[keras.callbacks.Callback]:
    """The callbacks for Keras's `verbose`: none for 0, a bar for 1, a line an epoch for 2.

    Raises:
        ValueError: For anything else but `"auto"`.
    """
    if verbose == "auto":
        verbose = 1 if Console().is_terminal else 2
    displays: dict[Any, list[type]] = {0: [], 1: [ProgressBar], 2: [EpochLines]}
    if isinstance(verbose, str) or verbose not in displays:
        raise ArgumentError(
            "HL701", f'verbose takes 0 (silent), 1 (bar), 2 (a line an epoch) or "auto"; received {verbose!r}.'
        )
    return [display() for display in displays[verbose]]


class _Clock:
    """Speed and time left, from steps taken."""

    def __init__(self, steps: int | None, epochs: int) -> None:
        self._steps, self._epochs = steps, epochs
        self._done = 0
        self._begun = time.perf_counter()
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        self._end = self._done + self._steps * (self._epochs - epoch) if self._steps else None

    def add(self, steps: int) -> None:
        self._done += steps

    @property
    def text(self) -> str:
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        speed = self._done / seconds
        shown = f"{speed:.0f} steps/s" if speed >= 10 else f"{speed:.2g} steps/s"
        if self._end is None or not self._done:
            return shown
        return f"{shown}, {_duration((self._end - self._done) / speed)} left"


class ProgressBar(Stateful, keras.callbacks.Callback):
    """A bar with the values so far, steps a second and the time left, refreshed ten times a second.

    Between two refreshes it does not look at the values, so that nothing waits for the device.

    Args:
        console: Where to draw; standard output by default.
    """

    takes_executions = True  # See `Callbacks.each_step`.

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console()
        self._bar: Progress | None = None
        self._training = False
        self._next_refresh = 0.0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._training = True
        self._clock = _Clock(self.params.get("steps"), self.params.get("epochs", 1))

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._clock.begin_epoch(epoch)
        self._open(f"Epoch {epoch + 1}/{self.params['epochs']}", self.params.get("steps"))

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._first = batch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._clock.add(batch + 1 - self._first)
        self._seen = self._first = batch + 1
        if time.perf_counter() >= self._next_refresh:
            self._refresh(logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._close(logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.close()

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self._training:
            self._clock = _Clock(self.params.get("steps"), 1)
            self._open("Evaluating", self.params.get("steps"))

    def on_test_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not self._training:
            self._count_one(batch, logs)

    def _count_one(self, batch: int, logs: Mapping[str, Any] | None) -> None:
        self.on_train_batch_begin(batch)
        self.on_train_batch_end(batch, logs)

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self._training:
            self._close(logs)

    def on_predict_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._clock = _Clock(self.params.get("steps"), 1)
        self._open("Predicting", self.params.get("steps"))

    def on_predict_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._count_one(batch, None)

    def on_predict_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self._close(None)

    def close(self) -> None:
        """Takes the bar down; also called when training ends by an exception."""
        self._training = False
        self._take_down()

    def _take_down(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self, title: str, steps: int | None) -> None:
        self._take_down()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[clock]}"),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task: TaskID = self._bar.add_task(title, total=steps, clock="", values="")
        self._bar.start()
        self._next_refresh = 0.0
        self._seen = self._first = 0

    def _refresh(self, logs: Mapping[str, Any] | None) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=self._seen, clock=self._clock.text, values=_values(logs), refresh=True)
        self._next_refresh = time.perf_counter() + _REFRESH_SECONDS

    def _close(self, logs: Mapping[str, Any] | None) -> None:
        if self._bar is not None:
            self._refresh(logs)
        self._take_down()


class EpochLines(Stateful, keras.callbacks.Callback):
    """One line for each epoch: for logs in a file."""

    def __init__(self) -> None:
        super().__init__()
        self._training = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._training = True

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._begun = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        duration = _duration(time.perf_counter() - self._begun)
        print(f"Epoch {epoch + 1}/{self.params['epochs']}  {duration}  {_values(logs)}", file=sys.stdout, flush=True)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.close()

    def close(self) -> None:
        """Training is over; also called when it ends by an exception."""
        self._training = False

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self._training:
            print(f"Evaluated  {_values(logs)}", file=sys.stdout, flush=True)


def _values(logs: Mapping[str, Any] | None) -> str:
    return "  ".join(f"{name} {_shown(value)}" for name, value in (logs or {}).items())


def _shown(value: Any) -> str:
    if isinstance(value, str):  # Which a callback of the user's may have added.
        return value
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=4, threshold=4)
    return f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
