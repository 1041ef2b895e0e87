"""When a run is saved, and how it resumes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from handloom._data.feed import Feed
from handloom._keras import global_seed_generator
from handloom._reporting.step import ReportingStep
from handloom._run.events import Events
from handloom._run.interrupt import Signals
from handloom._run.options import RunOptions
from handloom._run.state import Record
from handloom._util.every import Every
from handloom._util.progress import Progress
from handloom.checkpoint.checkpointer import Checkpointer
from handloom.checkpoint.names import named
from handloom.checkpoint.retention import OF_RUN
from handloom.checkpoint.store import Written
from handloom.distribute._strategy import current
from handloom.errors import CheckpointError, StepError


class Saving:
    """Saves a run now and then, and resumes it after it was stopped, wherever that was.

    Args:
        options: Where and when.
        parts: All that is saved, by name, in the order in which it is restored.
        record: What the run was made with; one of the parts.
        feed: The data.
        step: The training step.
        progress: Where training stands.
        signals: Those at which to save and stop.
        events: Which are told of what is saved.

    Attributes:
        triggers: When it is due within epochs.
    """

    def __init__(
        self,
        options: RunOptions,
        parts: Mapping[str, Any],
        *,
        record: Record,
        feed: Feed,
        step: ReportingStep,
        progress: Progress,
        signals: Signals,
        events: Events,
    ) -> None:
        assert options.directory is not None
        assert options.save is not None
        self._options, self._when, self._parts = options, options.save, parts
        self._record, self._feed, self._step, self._progress = record, feed, step, progress
        self._signals, self._events = signals, events
        self._checkpointer = Checkpointer(options.directory / OF_RUN, parts, keep=options.keep, best=options.best)
        self._saved: tuple[int, int] | None = None
        self._saved_at = time.perf_counter()
        self._told: Written | None = None
        self.triggers: list[Every] = [self._when]

    def __enter__(self) -> Saving:
        self._checkpointer.__enter__()
        self._signals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._signals.__exit__(*error)
        self._checkpointer.__exit__(*error)
        if self._signals.received is not None and error[0] is None:  # It came when all was done and saved.
            self._signals.stop()

    def resume(self, prepare: Callable[[], None]) -> bool:
        """Restores the last checkpoint, if there is one.

        Args:
            prepare: Makes the variables that the run's first steps would make.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: If the run is not to resume, or the checkpoint is of another.
            StepError: If the step uses variables that would not be saved.
        """
        steps, resume = self._checkpointer.steps, self._options.resume
        if steps and resume == "never":
            raise CheckpointError(
                f"HL551: {self._checkpointer.directory} has checkpoints of a run, up to step {steps[-1]}, and resume='never' "
                "begins anew. Use another run_dir, remove it, or go on with resume='auto'.",
            )
        if steps and resume == "exact" and not self._feed.seekable:
            raise CheckpointError(
                f"HL552: {self._feed.name} has no position to go on from: it would be read again up to there, in whatever "
                "order it then has. If that is its order, resume='auto' does so. Arrays have a position.",
            )
        prepare()  # So that all variables are there, and known.
        self._check_reached()
        if not steps:
            return False
        # Callbacks may come and go: a new one begins anew.
        self._checkpointer.restore(allow=[*self._options.allow, "callbacks.*", "events"])
        self._saved = self._now
        return True

    def resumed(self) -> dict[str, Any]:
        """What was restored, for the event that tells of it."""
        restored = self._checkpointer.restored
        return {
            "directory": str(self._checkpointer.directory),
            "variables": len(restored.variables),
            "things": ["the data", "random numbers", *_names_of_callbacks(restored.things)],
            "missing": list(restored.missing),
            "unused": list(restored.unused),
            "differences": self._record.differences,
            "reread": None if self._feed.seekable else self._feed.name,
        }

    def if_due(self, results: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Saves if it is time, or if a signal asks to stop; then it does not return.

        Raises:
            CheckpointError: If what was saved before could not be written.
        """
        self._checkpointer.check()
        self._tell_of_written()
        strategy = current()
        if strategy.agree(self._signals.received is not None):
            self.save_and_stop(results)
        due = self._when.due(self._progress, time.perf_counter() - self._saved_at) or self._is_best(results)
        if strategy.agree(due):
            self._save(results)

    def save_and_stop(self, results: Mapping[str, Any] = MappingProxyType({})) -> NoReturn:
        """Saves, and ends the process as the signal that has come asks for."""
        self._save(results)
        self._checkpointer.wait()
        self._tell_of_written()
        self._signals.stop()

    def end(self, results: Mapping[str, Any]) -> None:
        """Saves what the run ended with, unless that is saved."""
        if self._saved != self._now:
            self._save(results)
        self._checkpointer.wait()
        self._tell_of_written()

    @property
    def _now(self) -> tuple[int, int]:
        return self._progress.step, self._progress.batch

    def _is_best(self, results: Mapping[str, Any]) -> bool:
        """Whether these results, if there are any now, are the best so far of what `best` names."""
        return bool(results) and self._options.best is not None and self._checkpointer.is_best(_numbers(results))

    def _save(self, results: Mapping[str, Any]) -> None:
        self._checkpointer.save(self._progress.step, _numbers(results))
        self._tell_of_written()  # The one before, for which this one has waited.
        self._saved, self._saved_at = self._now, time.perf_counter()

    def _tell_of_written(self) -> None:
        """Tells what the last checkpoint took, once."""
        written = self._checkpointer.written
        if written is not None and written is not self._told:
            self._told = written
            facts = dataclasses.asdict(written)
            self._events.append(
                "saved",
                saved_step=facts["step"],
                bytes=facts["bytes"],
                duration=facts["seconds"],
                waited=facts["seconds_waited"],
            )

    def _check_reached(self) -> None:
        known = {id(variable) for variable in [*named(self._parts)[0].values(), global_seed_generator().state]}
        lost = [variable.path for variable in self._step.function.touched if id(variable) not in known]
        if lost:
            raise StepError(
                f"HL214: {self._step.function.__name__} uses variables that would not be saved: {', '.join(lost[:5])}"
                f"{' ...' if len(lost) > 5 else ''}. Name in state what they belong to, state={{'model': model, "
                "'optimizer': optimizer, 'metric': metric}; for a model, set it as an attribute.",
            )


def _names_of_callbacks(things: Sequence[str]) -> list[str]:
    return [name.removeprefix("callbacks.") for name in things if name.startswith("callbacks.")]


def _numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if np.ndim(value) == 0}


class NotSaving:
    """Stands for `Saving` in a run that is not saved."""

    triggers: Sequence[Every] = ()

    def __enter__(self) -> NotSaving:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def resume(self, prepare: Callable[[], None]) -> bool:
        """There is nothing to resume from, and no need to prepare for it."""
        del prepare
        return False

    def if_due(self, results: Mapping[str, Any] = MappingProxyType({})) -> None:
        """It never is."""

    def save_and_stop(self) -> NoReturn:
        """No signal is waited for."""
        raise AssertionError

    def resumed(self) -> dict[str, Any]:
        """Nothing was."""
        raise AssertionError

    def end(self, results: Mapping[str, Any]) -> None:
        """Nothing is saved."""
