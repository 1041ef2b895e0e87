"""Profiles of a few steps."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import ArgumentError


class Profile:
    """Makes the backend trace some steps of a run.

    Where steps are dispatched together, it traces whole dispatches: from the first that begins at or after the first
    step, to the first that ends at or after the last step.

    Args:
        steps: The first step and the last, counted from 1, or a single step; 0 for none.
        directory: The directory for the trace.

    Attributes:
        done: Whether the trace is written.

    Raises:
        ArgumentError: `steps` is something else.
    """

    def __init__(self, steps: int | tuple[int, int], directory: Path) -> None:
        self._first, self._last = _first_and_last(steps)
        self._directory = directory
        self._trace = contextlib.ExitStack()
        self._logs: Mapping[str, Any] = {}
        self.begin_run(0)

    def begin_run(self, taken: int) -> None:
        """Begins a new run, or resumes one after so many steps."""
        self._taken = taken
        if not taken:
            self.done = self._running = False

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """The hook before a dispatch, with the number of its first batch."""
        self._batch = batch
        if self._taken + 1 >= self._first and not self.done and not self._running:
            dict(self._logs)  # Waits until the device has computed the steps before.
            self._trace.enter_context(backend.profiled(self._directory))
            self._running = True

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """The hook after a dispatch, with the number of its last batch."""
        self._taken += batch + 1 - self._batch
        self._logs = {} if logs is None else logs  # Not `logs or {}`: a test for emptiness waits for the device.
        if self._taken >= self._last:
            self.stop()

    def stop(self) -> None:
        """Writes the trace so far."""
        if self._running:
            self.done, self._running = True, False
            with self._trace, contextlib.suppress(Exception):  # If a step has failed, the run itself reports it.
                dict(self._logs)  # Waits until the device has computed the traced steps.


def _first_and_last(steps: Any) -> tuple[float, float]:
    if type(steps) is int and steps == 0:
        return math.inf, math.inf
    pair = steps if isinstance(steps, (tuple, list)) else (steps, steps)
    if [type(step) for step in pair] != [int, int] or not 1 <= pair[0] <= pair[1]:
        raise ArgumentError(
            f"HL707: profile_batch takes one step, counted from 1, or the first and the last; received {short(steps)}.",
            fix="For example: profile_batch=(10, 20), or 0 for no profile.",
        )
    return pair[0], pair[1]
