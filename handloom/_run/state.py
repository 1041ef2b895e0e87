"""The parts of a run's state beside what it trains: each with `state()` and `restore(state)`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from handloom._data.feed import Feed
from handloom._keras import keras
from handloom._reporting.step import ReportingStep
from handloom._util.findings import warn
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.callbacks import callback_state, restore_callback
from handloom.checkpoint.configured import configured
from handloom.checkpoint.names import keras_objects
from handloom.errors import CheckpointError


class Record:
    """What the run was made with, for whoever looks at a checkpoint, and for who resumes it with other things.

    Args:
        state: What the run trains.

    Attributes:
        choices: What was chosen for it, by name.
        recorded: What was chosen in the run that is resumed, by name; empty before `restore`.
    """

    def __init__(self, state: Any) -> None:
        self.choices: dict[str, Any] = {}
        self.recorded: dict[str, Any] = {}
        self._configured = configured({"state": state})
        self._then: Mapping[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("handloom", "keras", "numpy")}
        facts = {"python": platform.python_version()} | versions | backend.versions()
        return {"versions": facts, "choices": self.choices, "configured": self._configured}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._then, self.recorded = state, dict(state["choices"])

    @property
    def differences(self) -> list[str]:
        """What is other than when the run was saved, in words."""
        if self._then is None:
            return []
        then, now = self._then, self.state()
        changed = [
            f"{name} {then[kind].get(name)} -> {now[kind].get(name)}"
            for kind in ("versions", "choices")
            for name in sorted(then[kind].keys() | now[kind].keys())
            if then[kind].get(name) != now[kind].get(name)
        ]
        one, other = then["configured"], now["configured"]
        others = [name for name in sorted(one.keys() & other.keys()) if one[name] != other[name]]
        return changed + ([f"the configuration of {', '.join(others)}"] if others else [])


class LoopPosition:
    """Where training stands, and whether it is over.

    Args:
        progress: The counts.
        model: Which callbacks may ask to stop.
        epochs: The epoch at which the run is to end.
        is_validating: Whether a validation was broken off, which belongs to the epoch whose steps are taken.
        resume_epoch: Called with the number of an epoch that had begun, when it is resumed: callbacks are told of it
            before they get their state back.
    """

    def __init__(
        self,
        progress: Progress,
        model: Any,
        epochs: int,
        is_validating: Callable[[], bool],
        resume_epoch: Callable[[int], None],
    ) -> None:
        self._progress, self._model, self._epochs = progress, model, epochs
        self._is_validating, self._resume_epoch = is_validating, resume_epoch

    def state(self) -> dict[str, Any]:
        progress = self._progress
        within = bool(progress.batch or self._is_validating())
        epoch = progress.epoch if progress.batch else progress.epoch - 1
        return vars(progress) | {
            "epoch_begun": epoch if within else None,
            "stopped": bool(self._model.stop_training),
            "epochs": self._epochs,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in vars(self._progress):
            setattr(self._progress, name, state[name])
        if state["epoch_begun"] is not None:
            self._resume_epoch(state["epoch_begun"])
        # One that a callback ended is over, unless it is now asked for more.
        self._model.stop_training = state["stopped"] and self._epochs <= state["epochs"]


class StrictFeed:
    """A feed that resumes at its exact place, or not at all."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def state(self) -> dict[str, Any]:
        return self._feed.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        differences = self._feed.differences(state)
        if differences:
            raise CheckpointError(
                f"HL553: The data is not what it was when the run was saved: {'; '.join(differences)}. Give it the same data, "
                "or go on all the same with resume='auto'.",
            )
        self._feed.restore(state)


class EpochReports:
    """What the steps of the epoch at hand have reported, and the metrics that were reset in it."""

    def __init__(self, step: ReportingStep, state: Any, progress: Progress) -> None:
        self._step, self._state, self._progress = step, state, progress

    def state(self) -> dict[str, Any]:
        renewed = set(map(id, self._step.renewed))
        metrics = [name for name, thing in keras_objects(self._state).items() if id(thing) in renewed]
        return {"logs": self._step.logs.state(), "metrics": metrics}

    def restore(self, state: Mapping[str, Any]) -> None:
        known, logs = keras_objects(self._state), state["logs"]
        if any("means" not in totals for totals in logs["totals"]):  # Of format 1.
            if self._progress.batch:
                warn("HL554: The checkpoint is of an older format: this epoch's averages begin at the resumed step.")
            return
        self._step.continue_epoch(logs, [known[name] for name in state["metrics"] if name in known])


class CallbackState:
    """A callback, as something that has a state."""

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        self._callback = callback

    def state(self) -> dict[str, Any]:
        return callback_state(self._callback)

    def restore(self, state: dict[str, Any]) -> None:
        restore_callback(self._callback, state)


def by_name(callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, keras.callbacks.Callback]:
    """Callbacks by class; several of one class are numbered."""
    found: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        name, count = type(callback).__name__, 1
        while name in found:
            name, count = f"{type(callback).__name__}{count + 1}", count + 1
        found[name] = callback
    return found
