"""The events of a run: one log, to which they are only ever appended, and its readers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from handloom._trace.function import Trace
from handloom._util.every import Every
from handloom._util.progress import Progress
from handloom.callbacks._event_reader import Event, EventReader
from handloom.errors import Finding, HandloomError


class Events:
    """Tells readers what happens in a run, each thing once, in order.

    Args:
        readers: Those who are told.
        progress: Where the run stands; looked at when something happens.

    Attributes:
        wants_progress: Whether a reader wants to be told within epochs.
    """

    def __init__(self, readers: Iterable[EventReader], progress: Progress) -> None:
        self._readers, self._progress = list(readers), progress
        self._begun = self._last = time.perf_counter()
        self._waiting = [_Waiting(reader, reader.every) for reader in self._readers if _is_within_epochs(reader.every)]
        self.wants_progress = bool(self._waiting)
        for reader in self._readers:
            reader.begin_reading()

    def append(self, kind: str, **data: Any) -> None:
        """Something happened; see `Event`."""
        event = self._event(kind, data)
        for reader in self._readers:
            reader.read(event)

    def tick(self, logs: Mapping[str, Any]) -> None:
        """After a step, or several in one dispatch: gives the values so far to the readers that want them now."""
        now = time.perf_counter()
        due = [waiting for waiting in self._waiting if waiting.every.due(self._progress, now - waiting.last)]
        if due:
            event = self._event("progress", {"values": dict(logs)})
            for waiting in due:
                waiting.last = now
                waiting.reader.read(event)

    def trace(self, function: str, trace: Trace) -> None:
        """A step was compiled."""
        self.append(
            "trace",
            function=function,
            signature=trace.signature,
            duration=trace.seconds,
            reason=trace.reason,
            compiled=trace.compiled,
        )

    def finding(self, finding: Finding) -> None:
        """A warning was given."""
        self.append("finding", **vars(finding))

    def end(self, values: Mapping[str, Any], error: BaseException | None = None) -> None:
        """The run is over."""
        self.append("run_end", values=dict(values), error=None if error is None else _described(error))

    def close(self) -> None:
        """Nothing happens any more."""
        for reader in self._readers:
            reader.close()

    def state(self) -> dict[str, Any]:
        """How long the run has taken."""
        return {"seconds": time.perf_counter() - self._begun}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes a run that has taken some time."""
        self._begun = time.perf_counter() - state["seconds"]

    def _event(self, kind: str, data: Mapping[str, Any]) -> Event:
        seconds, at = time.perf_counter() - self._begun, self._progress
        return Event(kind, at.epoch, at.step, at.batch, seconds, time.time(), data)


class _Waiting:
    """A reader that is told within epochs, and when it was last."""

    def __init__(self, reader: EventReader, every: Every | None) -> None:
        assert every is not None
        self.reader, self.every, self.last = reader, every, time.perf_counter()


def _is_within_epochs(every: Every | None) -> bool:
    return every is not None and every.epochs is None


def _described(error: BaseException) -> dict[str, Any]:
    finding = vars(error.finding) if isinstance(error, HandloomError) else None
    return {"type": type(error).__name__, "message": str(error), "finding": finding}
