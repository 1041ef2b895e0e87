"""The events of a run: one log that only grows, and its readers."""

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from handloom._trace.function import Trace
from handloom._util.progress import Progress
from handloom.callbacks._event_reader import Event, EventReader
from handloom.callbacks._json_logger import JSONLogger
from handloom.callbacks._progress_bar import progress_display
from handloom.errors import Finding, HandloomError


class Events:
    """Passes each event of a run to all readers, in order.

    Args:
        callbacks: The callbacks of the run; those that are event readers are its readers, too.
        verbose: The display, as for `hl.fit`.
        progress: The progress of the run, which is read when something happens.
        directory: The run directory, for the log as JSON lines; `None` for no such log.

    Attributes:
        wants_progress: Whether a reader wants `progress` events within epochs.
    """

    def __init__(self, callbacks: list[Any], verbose: str | int, progress: Progress, directory: Path | None) -> None:
        log = [] if directory is None else [JSONLogger(directory / "events.jsonl")]
        chosen = [callback for callback in callbacks if isinstance(callback, EventReader)]
        self._readers: list[EventReader] = [*chosen, *log, *progress_display(verbose)]
        self._progress, self._begun = progress, time.perf_counter()
        self._schedules = [(each, each.every) for each in self._readers if each.every and each.every.is_within_epochs]
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._has_begun = self._has_ended = False
        self._last_tick = {id(reader): self._begun for reader, _ in self._schedules}
        self.wants_progress = bool(self._schedules)
        for reader in self._readers:
            reader.begin_reading()

    def append(self, kind: str, **data: Any) -> None:
        """Passes a new event to the readers; see `Event`. Events before `run_begin` wait for it, and follow it."""
        self._waiting.append((kind, data))
        self._has_begun = self._has_begun or kind == "run_begin"
        if self._has_begun:
            waiting, self._waiting = sorted(self._waiting, key=lambda event: event[0] != "run_begin"), []
            for event in itertools.starmap(self._event, waiting):
                for reader in self._readers:
                    reader.read(event)

    def tick(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Passes the values so far to the readers that want them now; called after each dispatch."""
        now, at, last = time.perf_counter(), self._progress, self._last_tick
        due = [reader for reader, every in self._schedules if every.due(at, now - last[id(reader)])]
        if due:
            event = self._event("progress", {"values": values()})
            for reader in due:
                last[id(reader)] = now
                reader.read(event)

    def trace(self, function: str, trace: Trace) -> None:
        """A step was compiled."""
        facts = dict(vars(trace))
        self.append("trace", function=function, duration=facts.pop("seconds"), **facts)

    def finding(self, finding: Finding) -> None:
        """A warning was given."""
        self.append("finding", **vars(finding))

    def end(self, values: Mapping[str, Any], error: BaseException | None = None) -> None:
        """The run has ended; does nothing if it has not begun, or has ended before."""
        if self._has_ended or not self._has_begun:
            return
        self._has_ended = True
        finding = vars(error.finding) if isinstance(error, HandloomError) else None
        facts = {"type": type(error).__name__, "message": str(error), "finding": finding}
        self.append("run_end", values=dict(values), error=None if error is None else facts)

    def close(self) -> None:
        """Closes the readers."""
        for reader in self._readers:
            reader.close()

    def state(self) -> dict[str, Any]:
        """The duration of the run."""
        return {"seconds": time.perf_counter() - self._begun}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues to count from an earlier duration."""
        self._begun = time.perf_counter() - state["seconds"]

    def _event(self, kind: str, data: Mapping[str, Any]) -> Event:
        seconds, at = time.perf_counter() - self._begun, self._progress
        return Event(kind, at.epoch, at.step, at.batch, seconds, time.time(), data)
