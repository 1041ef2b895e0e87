"""Validation within a run. If a signal interrupts a validation, its effects are undone, and it runs again later."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from handloom._data.feed import Feed
from handloom._keras import Variable, keras
from handloom._reporting.logs import Value
from handloom._reporting.metrics import copied
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks
from handloom._run.events import Events
from handloom._run.interrupt import Signals
from handloom._util.every import AfterEpochs, Every
from handloom._util.findings import warn
from handloom._util.progress import Progress
from handloom._util.short import short
from handloom.checkpoint.random_state import random_state, set_random_state
from handloom.distribute._strategy import current
from handloom.errors import StepError

Results: TypeAlias = dict[str, Value]
Schedule: TypeAlias = Every | AfterEpochs


class _Interrupted(Exception):
    """A signal has asked the run to stop while it was validating."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """When and how a run is validated.

    Attributes:
        when: The schedule.
        run: Validates, with the callbacks and a function to call after each step, and returns the results.
        prepare: Compiles the validation step and creates its variables.
        assigned: Returns the variables that validation assigns, once it is prepared.
        feed: The data.
    """

    when: Schedule
    run: Callable[[Callbacks, Callable[[Any], None]], Results]
    prepare: Callable[[], None] = lambda: None
    assigned: Callable[[], list[Variable]] = list
    feed: Feed | None = None


NEVER = Validation(AfterEpochs(frozenset()), lambda *_: {})


def by_function(validate: Callable[[], Any], when: Schedule) -> Validation:
    """Validation by a function of the user."""

    def run(callbacks: Callbacks, _: Callable[[Any], None]) -> Results:
        callbacks.on_test_begin({})
        results = validate()
        if not isinstance(results, Mapping):
            raise StepError(
                f"HL211: validate() returned {short(results)}.", fix="Return numbers in a dict: {'loss': 0.1}."
            )
        numbers: Results = {str(name): float(keras.ops.convert_to_numpy(value)) for name, value in results.items()}
        callbacks.on_test_end(numbers)
        return numbers

    return Validation(when, run)


class Validations:
    """Validates when it is due, and keeps the last results for the end of the epoch.

    Args:
        validation: When and how to validate.
        training: The training step, which may use the same metrics.
        signals: The signals that ask the run to stop.
        events: Receives the results.

    Attributes:
        interrupted: Whether a signal has interrupted the last validation, which is therefore still due.
        triggers: The schedule, if it can be due within epochs.
    """

    def __init__(self, validation: Validation, training: ReportingStep, signals: Signals, events: Events) -> None:
        self._validation, self._training, self._signals, self._events = validation, training, signals, events
        self._results: Results = {}
        self._last_time = time.perf_counter()
        self.interrupted = False
        self.triggers = [when for when in [validation.when] if isinstance(when, Every) and when.is_within_epochs]

    def if_due(self, progress: Progress, callbacks: Callbacks) -> Results:
        """Validates if it is due; returns new results, and at the end of an epoch the last ones of the epoch."""
        due = self.interrupted or self._validation.when.due(progress, time.perf_counter() - self._last_time)
        if due := current().agree(due):
            self._validate(callbacks)
        return self._results if due or progress.batch == 0 else {}

    def _validate(self, callbacks: Callbacks) -> None:
        feed = self._validation.feed
        if feed is not None and feed.is_used_up:
            warn(
                f"HL762: The validation data ({feed.name}) has no more batches; the run continues without validation.",
                fix="Pass a function that returns a new generator each time (without calling it).",
            )
            self._validation, self.interrupted, self._results = NEVER, False, {}
            return
        # Training and validation may use the same metrics.
        restore_metrics, before = copied(self._training.metrics.variables), random_state()
        undo = copied(self._validation.assigned())
        self.interrupted = False
        try:
            results = self._validation.run(callbacks, self._check_signals)
        except _Interrupted:
            self.interrupted = True
            undo()
            set_random_state(before)
            return
        finally:
            restore_metrics()
        self._results = {f"val_{name}": value for name, value in results.items()}
        self._last_time = time.perf_counter()
        self._events.append("validation", values=results)

    def _check_signals(self, _: Any) -> None:
        if self._signals.received is not None:
            raise _Interrupted

    def prepare(self) -> None:
        """Compiles the validation step."""
        self._validation.prepare()

    def state(self) -> dict[str, Any]:
        """The last results of this epoch, and the position in the data."""
        feed = self._feed()
        position = None if feed is None else feed.state() | {"batch": 0}  # Each pass begins at its first batch.
        return {"results": dict(self._results), "broken_off": self.interrupted, "feed": position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state()`."""
        self._results, self.interrupted = dict(state["results"]), state["broken_off"]
        feed = self._feed()
        if feed is not None and state["feed"] is not None:
            feed.restore(state["feed"])

    def _feed(self) -> Feed | None:
        """The data, if its position between two passes consists of numbers only."""
        feed = self._validation.feed
        return feed if feed is not None and feed.seekable and "source" not in feed.state() else None

    def forget(self) -> None:
        """Forgets the results: a new epoch begins."""
        self._results = {}
