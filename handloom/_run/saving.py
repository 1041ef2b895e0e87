"""When a run is saved, and how it resumes."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from handloom._run.events import Events
from handloom._run.interrupt import Signals
from handloom._run.options import RunOptions
from handloom._util.every import Every
from handloom._util.progress import Progress
from handloom.checkpoint.checkpointer import Checkpointer
from handloom.checkpoint.encoding import decode
from handloom.checkpoint.retention import OF_RUN
from handloom.checkpoint.store import Written, newest_contents, slots
from handloom.distribute._strategy import current
from handloom.errors import CheckpointError


class NotSaving(contextlib.nullcontext[None]):
    """The null object for a run that is not saved."""

    triggers: Sequence[Every] = ()

    def resume(self, prepare: Callable[[], None], adapt: Callable[[Mapping[str, Any]], None]) -> dict[str, Any] | None:
        """Does nothing."""

    def if_due(self, results: Mapping[str, Any]) -> None:
        """Does nothing."""

    def end(self, results: Mapping[str, Any]) -> None:
        """Does nothing."""


class Saving:
    """Saves a run when it is due, and resumes it after it was stopped, at any point.

    Args:
        options: The options of the run.
        parts: Everything that is saved, by name, in the order in which it is restored.
        progress: The progress of the run.
        signals: The signals at which to save and stop.
        events: Receives an event for each checkpoint.

    Attributes:
        triggers: The schedules that can be due within epochs.
    """

    def __init__(
        self, options: RunOptions, parts: Mapping[str, Any], progress: Progress, signals: Signals, events: Events
    ) -> None:
        assert options.directory is not None
        assert options.save is not None
        self._options, self._progress, self._signals, self._events = options, progress, signals, events
        self._checkpointer = Checkpointer(options.directory / OF_RUN, parts, keep=options.keep, best=options.best)
        self._when, self.triggers = options.save, [options.save]
        self._saved: Progress | None = None
        self._saved_at = time.perf_counter()
        self._reported: Written | None = None

    def __enter__(self) -> None:
        self._checkpointer.__enter__()
        self._signals.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._signals.__exit__(*error)
        self._checkpointer.__exit__(*error)
        self._report_written()
        if self._signals.received is not None and error[0] is None:  # It came after everything was done and saved.
            self._signals.stop()

    def resume(self, prepare: Callable[[], None], adapt: Callable[[Mapping[str, Any]], None]) -> dict[str, Any] | None:
        """Restores the last checkpoint, if there is one.

        Args:
            prepare: Creates all variables, so that they can be restored, and checks that they will be saved.
            adapt: Called with the record of the saved run, before its variables must fit.

        Returns:
            A description of the restored state, as data of an event; `None` if there is no checkpoint.

        Raises:
            CheckpointError: The run must not resume, or the checkpoint is of another run.
        """
        if self._options.resume == "never" and (present := slots(self._checkpointer.directory)):
            raise CheckpointError(
                f"HL752: {self._checkpointer.directory} has checkpoints of a run, up to step {present[-1].step}, and "
                "resume='never' starts from scratch.",
                fix="Use another run_dir, remove this one, or resume with resume='auto'.",
            )
        prepare()
        adapt(decode(newest_contents(self._checkpointer.directory).get("run", {}), {}))
        # Callbacks may come and go: a new one starts from scratch.
        if self._checkpointer.restore(allow=[*self._options.allow, "callbacks.*", "events"]) is None:
            return None
        self._saved, restored = dataclasses.replace(self._progress), self._checkpointer.restored
        callbacks = [name.removeprefix("callbacks.") for name in restored.things if name.startswith("callbacks.")]
        return {
            "directory": str(self._checkpointer.directory),
            "variables": len(restored.variables),
            "things": ["the data", "random numbers", *callbacks],
            "missing": list(restored.missing),
            "unused": list(restored.unused),
        }

    def if_due(self, results: Mapping[str, Any]) -> None:
        """Saves if it is due. If a signal asks to stop, saves and does not return.

        Raises:
            CheckpointError: An earlier checkpoint could not be written.
        """
        self._checkpointer.check()
        self._report_written()
        strategy = current()
        self._signals.received = strategy.agree(self._signals.received)
        if self._signals.received is not None:
            self._save(results)
            self._wait()
            self._signals.stop()
        due = self._when.due(self._progress, time.perf_counter() - self._saved_at) or self._is_best(results)
        if strategy.agree(due):
            self._save(results)

    def end(self, results: Mapping[str, Any]) -> None:
        """Saves the end of the run, unless it is saved already."""
        if self._saved != self._progress:
            self._save(results)
        self._wait()

    def _is_best(self, results: Mapping[str, Any]) -> bool:
        return bool(results) and self._options.best is not None and self._checkpointer.is_best(_numbers(results))

    def _save(self, results: Mapping[str, Any]) -> None:
        self._checkpointer.save(self._progress.step, _numbers(results))
        self._report_written()  # Of the checkpoint before, for which this one has waited.
        self._saved, self._saved_at = dataclasses.replace(self._progress), time.perf_counter()

    def _wait(self) -> None:
        self._checkpointer.wait()
        self._report_written()

    def _report_written(self) -> None:
        """Appends one event for each checkpoint, once it is on the disk."""
        written = self._checkpointer.written
        if written is not None and written is not self._reported:
            self._reported = written
            times = {"duration": written.seconds, "waited": written.seconds_waited}
            self._events.append("saved", saved_step=written.step, bytes=written.bytes, **times)


def _numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if np.ndim(value) == 0}
