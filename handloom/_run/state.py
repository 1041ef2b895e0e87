"""The parts of a run's state besides what it trains. Each has `state()` and `restore(state)`."""

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from handloom._data.feed import Feed
from handloom._keras import keras
from handloom._reporting.step import ReportingStep
from handloom._run.frozen import Frozen
from handloom._util.findings import warn
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.checkpoint.configured import configured
from handloom.checkpoint.names import keras_objects
from handloom.errors import CheckpointError


class Record:
    """The versions, choices and configuration of a run: for readers of a checkpoint, and to compare on resume.

    Args:
        state: The objects that the run trains.

    Attributes:
        choices: The choices made for the run, by name.
        saved: The record of the run that is resumed; empty before `restore`.
    """

    def __init__(self, state: Any) -> None:
        self.choices: dict[str, Any] = {}
        self.saved: Mapping[str, Any] = {"versions": {}, "choices": {}, "configured": {}}
        self._configured = configured({"state": state})
        self._frozen = Frozen(state)

    def state(self) -> dict[str, Any]:
        versions = {"handloom": _own_version(), "keras": keras.__version__, "numpy": np.__version__}
        facts = {"python": platform.python_version()} | versions | backend.versions()
        frozen = self._frozen.state()
        return {"versions": facts, "choices": self.choices, "configured": self._configured, "frozen": frozen}

    def adapt(self, saved: Mapping[str, Any]) -> None:
        """Makes what the run trains fit the record of a saved run, before it is restored."""
        if "frozen" in saved:
            self._frozen.restore(saved["frozen"])

    def restore(self, state: Mapping[str, Any]) -> None:
        self.saved = state

    @property
    def differences(self) -> list[str]:
        """The changes since the run was saved, in words."""
        then, now = ({**record["versions"], **record["choices"]} for record in (self.saved, self.state()))
        names = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
        changed = [f"{name} {then[name]} -> {now[name]}" for name in names]
        before = self.saved["configured"]
        others = [name for name, after in sorted(self._configured.items()) if before.get(name, after) != after]
        return changed + ([f"the configuration of {', '.join(others)}"] if others else [])


@functools.cache
def _own_version() -> str:
    try:
        return importlib.metadata.version("handloom")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # Imported from its source.


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the state that other functions return and restore."""

    state: Callable[[], dict[str, Any]]
    restore: Callable[[dict[str, Any]], None]


def restore_exactly(feed: Feed, state: Mapping[str, Any]) -> None:
    """Resumes a feed at its exact position, or raises an error."""
    if not feed.seekable:
        raise CheckpointError(
            f"HL753: resume='exact' needs data with a position; {feed.name} has none.",
            "It would be read again up to the batch at which the run was stopped, in whatever order it has now.",
            "Pass arrays, which have a position; or, if the order is the same, resume='auto'.",
        )
    differences = feed.differences(state)
    if differences:
        raise CheckpointError(
            f"HL754: The data has changed since the run was saved: {'; '.join(differences)}.",
            fix="Pass the same data, or resume with the new data by resume='auto'.",
        )
    feed.restore(state)


class EpochReports:
    """The values that the steps of this epoch have reported, and the metrics that were reset in it."""

    def __init__(self, step: ReportingStep, state: Any, progress: Progress) -> None:
        self._step, self._state, self._progress = step, state, progress

    def state(self) -> dict[str, Any]:
        metrics = [name for name, thing in keras_objects(self._state).items() if thing in self._step.metrics]
        return {"logs": self._step.logs.state(), "metrics": metrics}

    def restore(self, state: Mapping[str, Any]) -> None:
        known, logs = keras_objects(self._state), state["logs"]
        if any("means" not in totals for totals in logs["totals"]):  # Of checkpoint format 1.
            if self._progress.batch:
                warn("HL755: The checkpoint has an older format: the averages of this epoch begin at the resumed step.")
            return
        self._step.continue_epoch(logs, [known[name] for name in state["metrics"] if name in known])
