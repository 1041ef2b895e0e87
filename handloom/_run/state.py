"""The parts of a run's state besides what it trains. Each has `state()` and `restore(state)`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
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
    """The versions, choices and configuration of a run: for readers of a checkpoint, and to compare on resume.

    Args:
        state: What the run trains.

    Attributes:
        choices: What was chosen for the run, by name.
        recorded: What was chosen for the run that is resumed; empty before `restore`.
    """

    def __init__(self, state: Any) -> None:
        self.choices: dict[str, Any] = {}
        self.recorded: dict[str, Any] = {}
        self._configured = configured({"state": state})
        self._saved: Mapping[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("handloom", "keras", "numpy")}
        facts = {"python": platform.python_version()} | versions | backend.versions()
        return {"versions": facts, "choices": self.choices, "configured": self._configured}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._saved, self.recorded = state, dict(state["choices"])

    @property
    def differences(self) -> list[str]:
        """What has changed since the run was saved, in words."""
        if self._saved is None:
            return []
        then, now = self._saved, self.state()
        changed = [
            f"{name} {then[kind].get(name)} -> {now[kind].get(name)}"
            for kind in ("versions", "choices")
            for name in sorted(then[kind].keys() | now[kind].keys())
            if then[kind].get(name) != now[kind].get(name)
        ]
        before = then["configured"]
        others = [name for name, after in sorted(self._configured.items()) if before.get(name, after) != after]
        return changed + ([f"the configuration of {', '.join(others)}"] if others else [])


class StrictFeed:
    """A feed that resumes at its exact position or raises an error."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def state(self) -> dict[str, Any]:
        return self._feed.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        if not self._feed.seekable:
            raise CheckpointError(
                f"HL753: resume='exact' needs data with a position; {self._feed.name} has none.",
                "It would be read again up to the batch at which the run was stopped, in whatever order it has now.",
                "Pass arrays, which have a position; or, if the order is the same, resume='auto'.",
            )
        differences = self._feed.differences(state)
        if differences:
            raise CheckpointError(
                f"HL754: The data has changed since the run was saved: {'; '.join(differences)}.",
                fix="Pass the same data, or resume with the new data by resume='auto'.",
            )
        self._feed.restore(state)


class EpochReports:
    """The values that the steps of this epoch have reported, and the metrics that were reset in it."""

    def __init__(self, step: ReportingStep, state: Any, progress: Progress) -> None:
        self._step, self._state, self._progress = step, state, progress

    def state(self) -> dict[str, Any]:
        metrics = [name for name, thing in keras_objects(self._state).items() if id(thing) in self._step.renewed]
        return {"logs": self._step.logs.state(), "metrics": metrics}

    def restore(self, state: Mapping[str, Any]) -> None:
        known, logs = keras_objects(self._state), state["logs"]
        if any("means" not in totals for totals in logs["totals"]):  # Of checkpoint format 1.
            if self._progress.batch:
                warn("HL755: The checkpoint has an older format: the averages of this epoch begin at the resumed step.")
            return
        self._step.continue_epoch(logs, [known[name] for name in state["metrics"] if name in known])


class CallbackState:
    """A callback with `state()` and `restore(state)`."""

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        self._callback = callback

    def state(self) -> dict[str, Any]:
        return callback_state(self._callback)

    def restore(self, state: dict[str, Any]) -> None:
        restore_callback(self._callback, state)
