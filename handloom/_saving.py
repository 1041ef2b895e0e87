"""What is saved of a run, when, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from handloom._callbacks import Callbacks
from handloom._data import Feed
from handloom._every import Every
from handloom._interrupt import Signals
from handloom._keras import global_seed_generator, keras
from handloom._progress import Progress
from handloom._reporting import ReportingStep
from handloom.backends import backend
from handloom.callbacks import callback_state, restore_callback
from handloom.checkpoint._checkpointer import Checkpointer
from handloom.checkpoint._names import named
from handloom.errors import CheckpointError, StepError

_RESUME = ("auto", "exact", "never")


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """Where and when a run is saved, and whether it goes on from there.

    Attributes:
        run_dir: The run's directory.
        when: When to save.
        resume: `"auto"` to go on where there is a checkpoint, `"exact"` to do so only where the data goes on at its
            exact place, `"never"` to begin anew, in a directory without checkpoints.
        keep: How many checkpoints to keep.
        best: By which metric to keep the best besides.
    """

    run_dir: Path
    when: Every
    resume: str = "auto"
    keep: int | None = 3
    best: str | None = None

    def __post_init__(self) -> None:
        if self.resume not in _RESUME:
            raise ValueError(f"resume takes one of {', '.join(map(repr, _RESUME))}; received {self.resume!r}.")
        if not isinstance(self.when, Every):
            raise TypeError(f"save takes a time such as hl.every(epochs=1), or None; received {self.when!r}.")


class Saving:
    """Saves a run now and then, and goes on with it after it was stopped, wherever that was.

    Args:
        options: Where and when.
        parts: What has a state, by name: `state`, what the run trains, in any structure; `feed`, its data; and more.
        prepares: Functions that make the variables which the run's first steps would make.
        step: The training step.
        progress: Where training stands.
        hooks: The callbacks as the loop calls them.
        callbacks: Those whose state belongs to the run, the history among them.
    """

    def __init__(
        self,
        options: SaveOptions,
        parts: Mapping[str, Any],
        *,
        prepares: Iterable[Callable[[], None]],
        step: ReportingStep,
        progress: Progress,
        hooks: Callbacks,
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> None:
        self._options, self._prepares, self._step, self._progress = options, prepares, step, progress
        self._feed: Feed = parts["feed"]
        self._signals = Signals()
        # In the order in which it is put back; after it come random numbers, then variables.
        self._whole = {
            "run": _Record(),
            "progress": _Place(progress, hooks),
            "step": _Epoch(step, parts["state"]),
            **parts,
            "callbacks": {name: _Kept(callback) for name, callback in _by_name(callbacks).items()},
        }
        directory = options.run_dir / "checkpoints"
        self._checkpointer = Checkpointer(directory, self._whole, keep=options.keep, best=options.best)
        self._saved: tuple[int, int] | None = None
        self._saved_at = time.perf_counter()

    def __enter__(self) -> Saving:
        self._checkpointer.__enter__()
        self._signals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._signals.__exit__(*error)
        self._checkpointer.close()

    def begin(self, *, tell: bool) -> None:
        """Goes on from the last checkpoint, if there is one, and tells of it.

        Raises:
            CheckpointError: If the run is not to go on, or the checkpoint is of another.
            StepError: If the step uses variables that would not be saved.
        """
        steps, resume = self._checkpointer.steps, self._options.resume
        if steps and resume == "never":
            raise CheckpointError(
                f"{self._checkpointer.directory} has checkpoints of a run, up to step {steps[-1]}, and resume='never' "
                "begins anew. Use another run_dir, remove it, or go on with resume='auto'."
            )
        if steps and resume == "exact" and not self._feed.seekable:
            raise CheckpointError(
                f"{self._feed.name} has no position to go on from: it would be read again up to there, in whatever "
                "order it then has. If that is its order, resume='auto' does so. Arrays have a position."
            )
        for prepare in self._prepares:  # So that all variables are there, and known.
            prepare()
        self._check_reached()
        if not steps:
            return
        self._checkpointer.restore()
        self._saved = self._place
        if tell:
            done = (
                f"{self._progress.step} steps taken, {self._progress.epoch} epochs and {self._progress.batch} batches"
            )
            how = (
                "" if self._feed.seekable else f" {self._feed.name} is read again up to there, in the order it now has."
            )
            print(f"Going on from {self._checkpointer.directory}: {done}.{how}", flush=True)

    def if_due(self, results: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Saves if it is time, or if a signal asks to stop; then it does not return."""
        signum = self._signals.received
        if signum is not None or self._options.when.due(self._progress, time.perf_counter() - self._saved_at):
            self._save(results)
        if signum is not None:
            self._checkpointer.wait()
            self._signals.stop(signum)

    def end(self, results: Mapping[str, Any]) -> None:
        """Saves what the run ended with, unless that is saved."""
        if self._saved != self._place:
            self._save(results)
        self._checkpointer.wait()

    @property
    def _place(self) -> tuple[int, int]:
        return self._progress.step, self._progress.batch

    def _save(self, results: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in results.items() if np.ndim(value) == 0}
        self._checkpointer.save(self._progress.step, numbers)
        self._saved, self._saved_at = self._place, time.perf_counter()

    def _check_reached(self) -> None:
        known = {id(variable) for variable in [*named(self._whole)[0].values(), global_seed_generator().state]}
        lost = [variable.path for variable in self._step.function.touched if id(variable) not in known]
        if lost:
            raise StepError(
                f"{self._step.function.__name__} uses variables that would not be saved: {', '.join(lost[:5])}"
                f"{' ...' if len(lost) > 5 else ''}. Name in state what they belong to, state={{'model': model, "
                "'optimizer': optimizer, 'metric': metric}; for a model, set it as an attribute."
            )


class _NotSaving:
    """Stands for `Saving` in a run that is not saved."""

    def __enter__(self) -> _NotSaving:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def begin(self, *, tell: bool) -> None:
        """There is nothing to go on from."""

    def if_due(self, results: Mapping[str, Any] = MappingProxyType({})) -> None:
        """It never is."""

    def end(self, results: Mapping[str, Any]) -> None:
        """Nothing is saved."""


def saving_of(options: SaveOptions | None, parts: Mapping[str, Any], **of: Any) -> Saving | _NotSaving:
    """What saves a run, as `Saving`; nothing for `None`."""
    return _NotSaving() if options is None else Saving(options, parts, **of)


class _Record:
    """What the run was made with: for whoever looks at a checkpoint."""

    def state(self) -> dict[str, str]:
        versions = {name: importlib.metadata.version(name) for name in ("handloom", "keras", "numpy")}
        return {"python": platform.python_version()} | versions | backend.versions()

    def restore(self, state: Mapping[str, str]) -> None:
        """A checkpoint of other versions, or of another backend, may be gone on with."""


class _Place:
    """Progress; going on within an epoch, callbacks are told of it before they get their state back."""

    def __init__(self, progress: Progress, hooks: Callbacks) -> None:
        self._progress, self._hooks = progress, hooks

    def state(self) -> dict[str, int]:
        return vars(self._progress).copy()

    def restore(self, state: Mapping[str, int]) -> None:
        vars(self._progress).update(state)
        if self._progress.batch:
            self._hooks.on_epoch_begin(self._progress.epoch, {})


class _Epoch:
    """What the steps of the epoch at hand have reported, and the metrics that they use."""

    def __init__(self, step: ReportingStep, state: Any) -> None:
        self._step, self._state = step, state

    def state(self) -> dict[str, Any]:
        used = {id(variable) for metric in self._step.renewed for variable in metric.variables[:1]}
        names = [name for name, variable in named(self._state)[0].items() if id(variable) in used]
        return {"logs": self._step.logs.state(), "metrics": sorted(names)}

    def restore(self, state: Mapping[str, Any]) -> None:
        names = set(state["metrics"])  # Of the first variable of each metric.
        used = {id(variable) for name, variable in named(self._state)[0].items() if name in names}
        self._step.continue_epoch(
            state["logs"], lambda metric: any(id(first) in used for first in metric.variables[:1])
        )


class _Kept:
    """A callback, as something that has a state."""

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        self._callback = callback

    def state(self) -> dict[str, Any]:
        return callback_state(self._callback)

    def restore(self, state: dict[str, Any]) -> None:
        restore_callback(self._callback, state)


def _by_name(callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, keras.callbacks.Callback]:
    """Callbacks by class; several of one class are numbered."""
    named_: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        name, count = type(callback).__name__, 1
        while name in named_:
            name, count = f"{type(callback).__name__}{count + 1}", count + 1
        named_[name] = callback
    return named_
