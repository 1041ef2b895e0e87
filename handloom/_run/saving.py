"""What is saved of a run, when, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from handloom._data.feed import Feed
from handloom._keras import global_seed_generator, keras
from handloom._reporting.step import ReportingStep
from handloom._run.interrupt import Signals
from handloom._run.state import CallbackState, Epoch, LoopPosition, Record, StrictFeed, by_name
from handloom._util.every import Every
from handloom.backends import backend
from handloom.callbacks import JSONLogger
from handloom.checkpoint.checkpointer import Checkpointer
from handloom.checkpoint.names import named
from handloom.checkpoint.retention import OF_RUN
from handloom.checkpoint.store import Written
from handloom.errors import ArgumentError, CheckpointError, StepError

_RESUME = ("auto", "exact", "never")


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """Where and when a run is saved, and whether it goes on from there.

    Attributes:
        run_dir: The run's directory.
        when: When to save.
        resume: `"auto"` to go on where there is a checkpoint, `"exact"` to do so only where the data goes on at its
            exact place, `"never"` to begin anew, in a directory without checkpoints.
        allow: Patterns of names that a checkpoint may lack, have besides, or have in another shape.
        keep: How many checkpoints to keep.
        best: By which metric to keep the best besides; it is saved when it is reported.
    """

    run_dir: Path
    when: Every
    resume: str = "auto"
    allow: Sequence[str] = ()
    keep: int | None = 3
    best: str | None = None

    def __post_init__(self) -> None:
        if self.resume not in _RESUME:
            raise ArgumentError(
                "HL028", f"resume takes one of {', '.join(map(repr, _RESUME))}; received {self.resume!r}."
            )
        if not isinstance(self.when, Every):
            raise ArgumentError(
                "HL029", f"save takes a time such as hl.every(epochs=1), or None; received {self.when!r}."
            )
        if isinstance(self.allow, str):
            raise ArgumentError(
                "HL030", f"allow takes a list of patterns, such as [{self.allow!r}]; received {self.allow!r}."
            )


class Saving:
    """Saves a run now and then, and goes on with it after it was stopped, wherever that was.

    Args:
        options: Where and when.
        parts: What has a state, by name: `state`, what the run trains, in any structure; `feed`, its data; and more.
        prepares: Functions that make the variables which the run's first steps would make.
        step: The training step.
        place: Where training stands.
        signals: Those at which to save and stop.
        callbacks: Those whose state belongs to the run, the history among them.
        log: The log of the run, if there is one.
    """

    def __init__(
        self,
        options: SaveOptions,
        parts: Mapping[str, Any],
        *,
        prepares: Iterable[Callable[[], None]],
        step: ReportingStep,
        place: LoopPosition,
        signals: Signals,
        callbacks: Sequence[keras.callbacks.Callback],
        log: Sequence[JSONLogger],
    ) -> None:
        self._options, self._prepares, self._step, self._place = options, prepares, step, place
        self._feed: Feed = parts["feed"]
        self._signals, self._log = signals, log
        self._record = Record(parts["state"])
        # In the order in which it is put back; after it come random numbers, then variables. First what may refuse.
        self._whole = {
            "feed": StrictFeed(self._feed) if options.resume == "exact" else self._feed,
            "run": self._record,
            "progress": place,
            "step": Epoch(step, parts["state"]),
            **{name: part for name, part in parts.items() if name != "feed"},
            "callbacks": {name: CallbackState(callback) for name, callback in by_name(callbacks).items()},
        }
        directory = options.run_dir / OF_RUN
        self._checkpointer = Checkpointer(directory, self._whole, keep=options.keep, best=options.best)
        self._saved: tuple[int, int] | None = None
        self._saved_at = time.perf_counter()
        self._logged: Written | None = None
        self.triggers = [options.when]

    def __enter__(self) -> Saving:
        self._checkpointer.__enter__()
        self._signals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._signals.__exit__(*error)
        self._checkpointer.__exit__(*error)
        if self._signals.received is not None and error[0] is None:  # It came when all was done and saved.
            self._signals.stop()

    def begin(self, choices: Mapping[str, int], *, tell: bool) -> None:
        """Goes on from the last checkpoint, if there is one, and tells of it.

        Args:
            choices: What was chosen for the run, for the record.
            tell: Whether to print what was restored.

        Raises:
            CheckpointError: If the run is not to go on, or the checkpoint is of another.
            StepError: If the step uses variables that would not be saved.
        """
        steps, resume = self._checkpointer.steps, self._options.resume
        jit_compile = backend.compiles_kernels(self._step.function.jit_compile)
        self._record.choices = {"jit_compile": jit_compile, **choices}
        if steps and resume == "never":
            raise CheckpointError(
                "HL550",
                f"{self._checkpointer.directory} has checkpoints of a run, up to step {steps[-1]}, and resume='never' "
                "begins anew. Use another run_dir, remove it, or go on with resume='auto'.",
            )
        if steps and resume == "exact" and not self._feed.seekable:
            raise CheckpointError(
                "HL551",
                f"{self._feed.name} has no position to go on from: it would be read again up to there, in whatever "
                "order it then has. If that is its order, resume='auto' does so. Arrays have a position.",
            )
        for prepare in self._prepares:  # So that all variables are there, and known.
            prepare()
        self._check_reached()
        if not steps:
            for log in self._log:  # That of a run which was ended before its first save: its steps are taken again.
                log.begin_anew()
        else:
            # Callbacks may come and go: a new one begins anew.
            self._checkpointer.restore(allow=[*self._options.allow, "callbacks.*"])
            self._saved = self._place.now
            if tell:
                print(*self._told(), sep="\n", flush=True)

    def if_due(self, results: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Saves if it is time, or if a signal asks to stop; then it does not return.

        Raises:
            CheckpointError: If what was saved before could not be written.
        """
        self._checkpointer.check()
        if self._checkpointer.written is not self._logged:
            self._log_written()
        if self._signals.received is not None:
            self.save_and_stop(results)
        due = self._options.when.due(self._place.progress, time.perf_counter() - self._saved_at)
        if due or self._is_best(results):
            self._save(results)

    def _is_best(self, results: Mapping[str, Any]) -> bool:
        """Whether these results, if there are any now, are the best so far of what `best` names."""
        return bool(results) and self._options.best is not None and self._checkpointer.is_best(_numbers(results))

    def save_and_stop(self, results: Mapping[str, Any] = MappingProxyType({})) -> NoReturn:
        """Saves, and ends the process as the signal that has come asks for."""
        self._save(results)
        self._checkpointer.wait()
        self._log_written()
        self._signals.stop()

    def end(self, results: Mapping[str, Any]) -> None:
        """Saves what the run ended with, unless that is saved."""
        if self._saved != self._place.now:
            self._save(results)
        self._checkpointer.wait()
        self._log_written()

    def _save(self, results: Mapping[str, Any]) -> None:
        self._checkpointer.save(self._place.progress.step, _numbers(results))
        self._log_written()  # The one before, for which this one has waited.
        self._saved, self._saved_at = self._place.now, time.perf_counter()

    def _log_written(self) -> None:
        """Notes in the log what the last checkpoint took."""
        written = self._checkpointer.written
        if written is not None and written is not self._logged:
            for log in self._log:
                log.write({"saved": dataclasses.asdict(written)})
        self._logged = written

    def _told(self) -> Iterator[str]:
        """What a run goes on from, line by line."""
        progress, restored = self._place.progress, self._checkpointer.restored
        yield (
            f"Going on from {self._checkpointer.directory}: {progress.step} steps taken, {progress.epoch} epochs and "
            f"{progress.batch} batches."
        )
        callbacks = [name.removeprefix("callbacks.") for name in restored.things if name.startswith("callbacks.")]
        yield (
            f"  Restored: {len(restored.variables)} variables, the position in the data, random numbers, and "
            f"{', '.join(callbacks)}."
        )
        if restored.missing:
            yield f"  Not in the checkpoint, and begun anew: {', '.join(restored.missing)}."
        if restored.unused:
            yield f"  Only in the checkpoint: {', '.join(restored.unused)}."
        if self._record.differences:
            yield (f"  Not as it was saved, so not to the bit from here on: {'; '.join(self._record.differences)}.")
        if not self._feed.seekable:
            yield f"  {self._feed.name} is read again up to there, in the order it now has."

    def _check_reached(self) -> None:
        known = {id(variable) for variable in [*named(self._whole)[0].values(), global_seed_generator().state]}
        lost = [variable.path for variable in self._step.function.touched if id(variable) not in known]
        if lost:
            raise StepError(
                "HL212",
                f"{self._step.function.__name__} uses variables that would not be saved: {', '.join(lost[:5])}"
                f"{' ...' if len(lost) > 5 else ''}. Name in state what they belong to, state={{'model': model, "
                "'optimizer': optimizer, 'metric': metric}; for a model, set it as an attribute.",
            )


def _numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if np.ndim(value) == 0}


class NotSaving:
    """Stands for `Saving` in a run that is not saved."""

    triggers: Sequence[Every] = ()

    def __enter__(self) -> NotSaving:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def begin(self, choices: Mapping[str, int], *, tell: bool) -> None:
        """There is nothing to go on from."""

    def if_due(self, results: Mapping[str, Any] = MappingProxyType({})) -> None:
        """It never is."""

    def save_and_stop(self) -> NoReturn:
        """No signal is waited for."""
        raise AssertionError

    def end(self, results: Mapping[str, Any]) -> None:
        """Nothing is saved."""


def saving_of(options: SaveOptions | None, parts: Mapping[str, Any], **of: Any) -> Saving | NotSaving:
    """What saves a run, as `Saving`; nothing for `None`."""
    return NotSaving() if options is None else Saving(options, parts, **of)
