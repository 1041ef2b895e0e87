"""One run: where it stands, and all that surrounds its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optree

from handloom._data.feed import Feed
from handloom._keras import Variable, keras, take_initial_epoch
from handloom._reporting.logs import Value
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks
from handloom._run.events import Events
from handloom._run.grouping import grouped, steps_a_dispatch, taking_groups
from handloom._run.interrupt import Signals
from handloom._run.options import RunOptions, as_list
from handloom._run.saving import NotSaving, Saving
from handloom._run.state import CallbackState, EpochReports, LoopPosition, Record, StrictFeed, by_name
from handloom._run.validation import Validation, Validations
from handloom._trace.function import traced
from handloom._util.every import AfterEpochs, Every
from handloom._util.findings import given
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.callbacks._display import progress_display
from handloom.callbacks._event_reader import EventReader
from handloom.callbacks._json_logger import JSONLogger
from handloom.distribute._strategy import check_strategy


class Run:
    """One training run. As a context manager it is ready to begin, and closes what it has opened.

    Args:
        step: The training step.
        feed: Its data.
        options: Where and when it is saved, and so on.
        model: What callbacks know as `self.model`.
        state: What the run trains.
        epochs: The epoch at which it ends.
        initial_epoch: The epoch at which it begins, unless it is resumed.
        steps: Steps in an epoch, `None` if unknown.
        validation: How it is validated.
        validate_every: When.
        callbacks: Keras callbacks.

    Attributes:
        progress: Where it stands.
        callbacks: The callbacks, by their hooks.
        signals: Those that ask it to stop.
        strategy: How it uses its devices.
        choices: What was chosen for it, by name.
        events: What happens in it.
        history: What every epoch reported.
        results: What the last epoch reported.
        acts_within_epochs: Whether there is anything to be done between two steps.
    """

    def __init__(
        self,
        step: ReportingStep,
        feed: Feed,
        options: RunOptions,
        *,
        model: Any,
        state: Any,
        epochs: int,
        initial_epoch: int,
        steps: int | None,
        validation: Validation | None,
        validate_every: Every | AfterEpochs,
        callbacks: Iterable[keras.callbacks.Callback],
    ) -> None:
        self._step, self._feed, self._options, self._model = step, feed, options, model
        self._state, self._epochs, self._steps = state, epochs, steps
        self.progress, self.signals = Progress(epoch=initial_epoch), Signals()
        self.strategy = check_strategy(options.strategy)
        self.history = keras.callbacks.History()
        mine = [*as_list(callbacks), self.history]
        self.callbacks = Callbacks(mine, model, {"epochs": epochs, "steps": steps, "verbose": options.verbose})
        self.events = Events([*_readers(mine, options), *progress_display(options.verbose)], self.progress)
        self._validations = Validations(validation, validate_every, step, self.signals)
        is_saved = options.directory is not None and options.save is not None
        self._record = Record(state if is_saved else None)
        self._saving = self._saved_by(state, mine) if is_saved else NotSaving()
        self.acts_within_epochs = bool(
            self._saving.triggers or self._validations.triggers or self.events.wants_progress
        )
        self.results: dict[str, Value] = {}
        self._steps_taken = steps or 0
        self._open = contextlib.ExitStack()

    def _saved_by(self, state: Any, callbacks: list[keras.callbacks.Callback]) -> Saving:
        position = LoopPosition(
            self.progress,
            self._model,
            self._epochs,
            is_validating=lambda: self._validations.broken_off,
            resume_epoch=lambda epoch: self.callbacks.on_epoch_begin(epoch, {}),
        )
        # In the order in which they are restored, first what may refuse; then random numbers, then variables.
        parts = {
            "feed": StrictFeed(self._feed) if self._options.resume == "exact" else self._feed,
            "run": self._record,
            "progress": position,
            "step": EpochReports(self._step, state, self.progress),
            "state": state,
            "validations": self._validations,
            "events": self.events,
            "callbacks": {name: CallbackState(callback) for name, callback in by_name(callbacks).items()},
        }
        return Saving(
            self._options,
            parts,
            record=self._record,
            feed=self._feed,
            step=self._step,
            progress=self.progress,
            signals=self.signals,
            events=self.events,
        )

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as opened:
            opened.callback(self.events.close)
            opened.enter_context(self.callbacks)
            opened.enter_context(self.strategy.scope())
            opened.enter_context(given.added(self.events.finding))
            opened.enter_context(traced.added(self.events.trace))
            opened.enter_context(self._saving)
            self._open = opened.pop_all()
        self._model.stop_training = False
        take_initial_epoch(self._model)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        with self._open:
            if error is not None:
                self.events.end(self.results, error)

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen for it, by name."""
        return self._record.choices

    def begin(self) -> None:
        """Begins, or resumes, and validates if a signal broke that off."""
        self.callbacks.on_train_begin({})
        self.progress.epoch = max(self.progress.epoch, take_initial_epoch(self._model))
        resumed = self._saving.resume(self._prepare)
        self.strategy.place(_variables_in(self._state))
        self._record.choices = {
            "jit_compile": backend.compiles_kernels(self._step.function.jit_compile),
            "steps_per_execution": steps_a_dispatch(
                self._options.steps_per_execution,
                self._record.recorded.get("steps_per_execution"),
                each_step=self.callbacks.each_step,
            ),
        }
        self.events.append(
            "run_begin",
            activity="fit",
            epochs=self._epochs,
            steps=self._steps,
            resumed=self._saving.resumed() if resumed else None,
        )
        if self._validations.broken_off:
            (self.after_steps if self.progress.batch else self.end_epoch)()

    def _prepare(self) -> None:
        self._step.prepare(self._feed.peek())
        self._validations.prepare()

    def begin_epoch(self) -> None:
        """Begins an epoch, unless it is resumed within one."""
        if not self.progress.batch:
            self._validations.forget()
            self._step.start_epoch()
            self.callbacks.on_epoch_begin(self.progress.epoch, {})

    def dispatches(self, batches: Iterator[Any]) -> tuple[Callable[[Any], None], Iterator[Any], bool]:
        """What takes the steps of a dispatch, what it takes, and whether that is a list of several batches."""
        batches, size = self.strategy.put(batches), self.choices["steps_per_execution"]
        if size == 1:
            return self._step.take, batches, False
        due = [*self._saving.triggers, *self._validations.triggers, *self.callbacks.triggers]
        return taking_groups(self._step, size), grouped(batches, size, self.progress, due), True

    def after_steps(self) -> None:
        """After a step, or several in one dispatch: progress is told, then validation and saving, if they are due."""
        if self.events.wants_progress:
            self.events.tick(self._step.logs)
        found = self._validate() if self._validations.triggers else {}
        if not self._model.stop_training:
            self._saving.if_due(found)

    def finish_epoch(self) -> None:
        """After the last step of an epoch."""
        self._steps_taken = self.progress.batch
        self.progress.end_epoch()
        self.end_epoch()

    def end_epoch(self) -> None:
        """After an epoch: validation, callbacks, saving, in this order."""
        self.results = self._step.logs.reported()
        self.results.update(self._validate())
        if self._validations.broken_off:
            self._saving.save_and_stop()
        self.callbacks.on_epoch_end(self.progress.epoch - 1, self.results)
        self.events.append("epoch", values=dict(self.results), steps=self._steps_taken)
        self._saving.if_due(self.results)

    def end(self, finish: Callable[[], None]) -> None:
        """After the last epoch."""
        self._saving.end(self.results)
        finish()
        self.callbacks.on_train_end(self.results)
        self.events.end(self.results)

    def _validate(self) -> dict[str, Value]:
        results, new = self._validations.if_due(self.progress, self.callbacks)
        if new:
            self.events.append(
                "validation", values={name.removeprefix("val_"): value for name, value in results.items()}
            )
        return results


def _variables_in(state: Any) -> list[Variable]:
    """The variables there are of what a run trains."""
    found: dict[int, Variable] = {}
    for leaf in optree.tree_leaves(state):
        variables = [leaf] if isinstance(leaf, keras.Variable) else getattr(leaf, "variables", ())
        found.update((id(variable), variable) for variable in variables)
    return list(found.values())


def _readers(callbacks: Iterable[keras.callbacks.Callback], options: RunOptions) -> list[EventReader]:
    log = [] if options.directory is None else [JSONLogger(options.directory / "events.jsonl")]
    return [*(callback for callback in callbacks if isinstance(callback, EventReader)), *log]
