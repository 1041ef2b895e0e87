"""Validation within a run: when, with which results; broken off by a signal, it is as if it had not begun."""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from handloom._data.feed import Feed
from handloom._keras import Variable, keras
from handloom._reporting.logs import Value
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks
from handloom._run.interrupt import Signals
from handloom._util.every import AfterEpochs, Every
from handloom._util.progress import Progress
from handloom.checkpoint.random_state import random_state, set_random_state
from handloom.distribute._strategy import current
from handloom.errors import StepError

Results = dict[str, Value]


class BrokenOff(Exception):
    """Raised in a validation when a signal asks the run to stop."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """How a run is validated.

    Attributes:
        run: Validates, and returns the results; raises `BrokenOff` between two steps, if a signal has come.
        prepare: Compiles what that needs, and makes its variables.
        changed: The variables that it assigns, once it is prepared.
        feed: Its data.
    """

    run: Callable[[Callbacks, Signals], Results]
    prepare: Callable[[], None] = lambda: None
    changed: Callable[[], list[Variable]] = list
    feed: Feed | None = None


def by_function(validate: Callable[[], Any]) -> Validation:
    """Validation by a function of the user's."""

    def run(hooks: Callbacks, _: Signals) -> Results:
        hooks.on_test_begin({})
        results = _checked(validate())
        hooks.on_test_end(results)
        return results

    return Validation(run)


def is_pair(validate: Any) -> bool:
    """Whether `validate=` is a step and its data."""
    return isinstance(validate, Sequence) and len(validate) == 2 and callable(validate[0])


def check_validate(validate: Any) -> None:
    """Checks what was given as `validate=`.

    Raises:
        StepError: If nothing can be validated by it.
    """
    if validate is not None and not is_pair(validate) and not callable(validate):
        raise StepError(
            "HL210: validate takes a pair (step, data), or a function without arguments that returns a dict of numbers; "
            f"received {reprlib.repr(validate)} (of type {type(validate).__name__}).",
        )


def _checked(results: Any) -> Results:
    if not isinstance(results, Mapping):
        raise StepError(
            "HL211: The function given as validate must return a dict of numbers, such as {'loss': 0.1}; it returned "
            f"{results!r}.",
        )
    return {str(name): float(keras.ops.convert_to_numpy(value)) for name, value in results.items()}


class Validations:
    """Validates when it is time, and keeps the last results for the end of the epoch.

    Args:
        validation: How; `None` for never.
        when: When.
        training: The training step, which may use the same metrics.
        signals: Those that ask the run to stop.

    Attributes:
        broken_off: Whether a signal came during the last validation, which is due still.
        triggers: When it is due within epochs.
    """

    def __init__(
        self, validation: Validation | None, when: Every | AfterEpochs, training: ReportingStep, signals: Signals
    ) -> None:
        self._validation, self._when, self._training, self._signals = validation, when, training, signals
        self._results: Results = {}
        self._last_time = time.perf_counter()
        self.broken_off = False
        within = validation is not None and isinstance(when, Every) and when.is_within_epochs
        self.triggers: list[Every] = [when] if within and isinstance(when, Every) else []

    def if_due(self, progress: Progress, hooks: Callbacks) -> tuple[Results, bool]:
        """Validates if it is time.

        Returns:
            The results, at the end of an epoch the last ones in it; and whether they are new.
        """
        if self._validation is None:
            return {}, False
        due = self.broken_off or self._when.due(progress, time.perf_counter() - self._last_time)
        due = current().agree(due)
        if due:
            self._validate(self._validation, hooks)
        return self._results if due or progress.batch == 0 else {}, due and not self.broken_off

    def _validate(self, validation: Validation, hooks: Callbacks) -> None:
        try:
            with self._training.metrics_kept(), _undone_if_broken_off(validation.changed()):
                results = validation.run(hooks, self._signals)
        except BrokenOff:
            self.broken_off = True
            return
        self.broken_off = False
        self._results = {f"val_{name}": value for name, value in results.items()}
        self._last_time = time.perf_counter()

    def prepare(self) -> None:
        """Compiles what validation needs."""
        if self._validation is not None:
            self._validation.prepare()

    def state(self) -> dict[str, Any]:
        """The last results of this epoch, and the position in the data."""
        feed = self._feed()
        return {
            "results": dict(self._results),
            "broken_off": self.broken_off,
            "feed": None if feed is None else feed.state() | {"batch": 0},  # Each pass begins at its first batch.
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes with them."""
        self._results, self.broken_off = dict(state["results"]), state["broken_off"]
        feed = self._feed()
        if feed is not None and state["feed"] is not None:
            feed.restore(state["feed"])

    def _feed(self) -> Feed | None:
        """The data, where its position between two passes is numbers and no more."""
        feed = None if self._validation is None else self._validation.feed
        return feed if feed is not None and feed.seekable and "source" not in feed.state() else None

    def forget(self) -> None:
        """A new epoch has its own results."""
        self._results = {}


@contextlib.contextmanager
def _undone_if_broken_off(variables: list[Variable]) -> Iterator[None]:
    """Puts variables and random numbers back to what they were, if a signal comes."""
    numbers, values = random_state(), [keras.ops.copy(variable.value) for variable in variables]
    try:
        yield
    except BrokenOff:
        set_random_state(numbers)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        raise
