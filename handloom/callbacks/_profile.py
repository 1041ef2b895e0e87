"""Where the time of a few steps goes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handloom.backends import backend
from handloom.errors import ArgumentError


class Profile:
    """Has the backend trace some steps of a run.

    Where steps are dispatched together, it traces whole dispatches: from the first that begins at one of the steps, or
    after, to the first that ends with the last of them, or after.

    Args:
        steps: The first and the last, counted from 1; or the only one.
        directory: Where the trace is written.

    Raises:
        ValueError: If these are no steps.
    """

    def __init__(self, steps: int | tuple[int, int], directory: Path) -> None:
        self._first, self._last = _first_and_last(steps)
        self._directory = directory
        self._trace = contextlib.ExitStack()
        self.start_over()

    def start_over(self) -> None:
        """What follows is a new run."""
        self.done = self._running = False
        self._logs: Mapping[str, Any] = {}

    def begin(self, step: int) -> None:
        """To be called before a step."""
        if step >= self._first and not self.done and not self._running:
            dict(self._logs)  # Waits until the device has computed what came before.
            self._trace.enter_context(backend.profiled(self._directory))
            self._running = True

    def end(self, step: int, logs: Mapping[str, Any]) -> None:
        """To be called after a step, with what it reports."""
        self._logs = logs
        if step >= self._last:
            self.stop()

    def stop(self) -> None:
        """Writes what has been traced so far."""
        if self._running:
            self.done, self._running = True, False
            with self._trace, contextlib.suppress(Exception):  # If a step has failed, the run says so itself.
                dict(self._logs)  # Waits for the traced ones, in the same manner.


def _first_and_last(steps: Any) -> tuple[int, int]:
    pair = steps if isinstance(steps, (tuple, list)) else (steps, steps)
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in pair)
    if not whole or len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
        raise ArgumentError(
            "HL707: profile_batch takes the number of a step, counted from 1, a pair of the first and the last, such as "
            f"(10, 20), or 0 for no profile; received {steps!r}.",
        )
    return pair[0], pair[1]
