"""What a run is made of beside what it trains: each part with `state()` and `restore(state)`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from handloom._data.feed import Feed
from handloom._keras import keras
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks
from handloom._run.validation import Validations
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.callbacks import callback_state, restore_callback
from handloom.checkpoint.configured import configured
from handloom.checkpoint.names import keras_objects
from handloom.errors import CheckpointError


class Record:
    """What the run was made with, for whoever looks at a checkpoint, and for who goes on with other things.

    Args:
        state: What the run trains.

    Attributes:
        choices: What was chosen for it, by name.
        differences: What is other than when it was saved, in words; after `restore`.
    """

    def __init__(self, state: Any) -> None:
        self.choices: dict[str, Any] = {}
        self.differences: list[str] = []
        self._configured = configured({"state": state})

    def state(self) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("handloom", "keras", "numpy")}
        facts = {"python": platform.python_version()} | versions | backend.versions()
        return {"versions": facts, "choices": self.choices, "configured": self._configured}

    def restore(self, state: Mapping[str, Any]) -> None:
        now = self.state()
        pairs = [(state[kind], now[kind]) for kind in ("versions", "choices")]
        self.differences = [
            f"{name} {then.get(name)} -> {found.get(name)}"
            for then, found in pairs
            for name in sorted(then.keys() | found.keys())
            if then.get(name) != found.get(name)
        ]
        then, found = state["configured"], now["configured"]
        others = [name for name in sorted(then.keys() & found.keys()) if then[name] != found[name]]
        if others:
            self.differences.append(f"the configuration of {', '.join(others)}")


class LoopPosition:
    """Where training stands; going on within an epoch, callbacks are told of it before they get their state back.

    Args:
        progress: Counts.
        hooks: The callbacks as the loop calls them.
        model: Which they may ask to stop.
        epochs: The epoch at which the run is to end.
        validations: One that was broken off belongs to the epoch whose steps are taken.

    Attributes:
        progress: As given.
    """

    def __init__(self, progress: Progress, hooks: Callbacks, model: Any, epochs: int, validations: Validations) -> None:
        self.progress = progress
        self._hooks, self._model, self._epochs, self._validations = hooks, model, epochs, validations

    @property
    def now(self) -> tuple[int, int]:
        """Steps taken, of which in the epoch at hand."""
        return self.progress.step, self.progress.batch

    def state(self) -> dict[str, Any]:
        within = bool(self.progress.batch or self._validations.broken_off)
        epoch = self.progress.epoch if self.progress.batch else self.progress.epoch - 1
        return vars(self.progress) | {
            "epoch_begun": epoch if within else None,
            "stopped": bool(self._model.stop_training),
            "epochs": self._epochs,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in vars(self.progress):
            setattr(self.progress, name, state[name])
        if state["epoch_begun"] is not None:
            self._hooks.on_epoch_begin(state["epoch_begun"], {})
        # One that a callback ended is over, unless it is now asked for more.
        self._model.stop_training = state["stopped"] and self._epochs <= state["epochs"]


class StrictFeed:
    """A feed that goes on at its exact place, or not at all."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def state(self) -> dict[str, Any]:
        return self._feed.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        differences = self._feed.differences(state)
        if differences:
            raise CheckpointError(
                "HL552",
                f"The data is not what it was when the run was saved: {'; '.join(differences)}. Give it the same data, "
                "or go on all the same with resume='auto'.",
            )
        self._feed.restore(state)


class Epoch:
    """What the steps of the epoch at hand have reported, and the metrics that were reset in it."""

    def __init__(self, step: ReportingStep, state: Any) -> None:
        self._step, self._state = step, state

    def state(self) -> dict[str, Any]:
        renewed = set(map(id, self._step.renewed))
        metrics = [name for name, thing in keras_objects(self._state).items() if id(thing) in renewed]
        return {"logs": self._step.logs.state(), "metrics": metrics}

    def restore(self, state: Mapping[str, Any]) -> None:
        known = keras_objects(self._state)
        self._step.continue_epoch(state["logs"], [known[name] for name in state["metrics"] if name in known])


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
    named_: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        name, count = type(callback).__name__, 1
        while name in named_:
            name, count = f"{type(callback).__name__}{count + 1}", count + 1
        named_[name] = callback
    return named_
