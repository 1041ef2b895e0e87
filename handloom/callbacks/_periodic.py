"""Callbacks that do something now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom._util.every import Every
from handloom._util.progress import Progress
from handloom.callbacks._state import Stateful
from handloom.errors import ArgumentError


class Periodic(Stateful, keras.callbacks.Callback):
    """Counts steps and calls `within_epoch` and `end_of_epoch` when it is time.

    Args:
        every: When. Unless it counts epochs, each end of an epoch is one of its times too.

    Attributes:
        progress: Where training stands.
    """

    takes_executions = True  # See `Callbacks.each_step`.

    def __init__(self, every: Every) -> None:
        super().__init__()
        if not isinstance(every, Every):
            raise ArgumentError("HL706", f"every takes a time such as hl.every(steps=100); received {every!r}.")
        self.every = every
        self.progress = Progress()

    def within_epoch(self, logs: Mapping[str, Any]) -> None:
        """What is done after a step."""

    def end_of_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        """What is done at the end of an epoch."""

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self.progress = Progress()
        self._last_time = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.progress.epoch, self.progress.batch = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.progress.step += batch + 1 - self.progress.batch
        self.progress.batch = batch + 1
        if self.every.epochs is None and self.every.due(self.progress, time.perf_counter() - self._last_time):
            self._last_time = time.perf_counter()
            self.within_epoch(logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.progress.end_epoch()
        if self.every.epochs is None or self.every.due(self.progress):
            self._last_time = time.perf_counter()
            self.end_of_epoch(epoch, {} if logs is None else logs)

    def state(self) -> dict[str, Any]:
        """What the callback carries between hooks, as JSON values."""
        return super().state() | {"step": self.progress.step, "batch": self.progress.batch}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there; to be called after `on_train_begin`."""
        super().restore(state)
        self.progress.step, self.progress.batch = state["step"], state["batch"]
