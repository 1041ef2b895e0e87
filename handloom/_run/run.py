"""One run: its progress, and everything around its steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import optree

from handloom._data.feed import Feed
from handloom._keras import Variable, global_seed_generator, keras, take_initial_epoch
from handloom._reporting.logs import Value
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks, as_list, by_name
from handloom._run.events import Events
from handloom._run.grouping import grouped, limited, steps_a_dispatch
from handloom._run.interrupt import Signals
from handloom._run.options import RunOptions
from handloom._run.saving import NotSaving, Saving
from handloom._run.state import CallbackState, EpochReports, Record, StrictFeed
from handloom._run.validation import NEVER, Validation, Validations
from handloom._trace.function import traced
from handloom._util.arguments import whole_number
from handloom._util.findings import given
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.checkpoint.names import named
from handloom.distribute._strategy import check_strategy
from handloom.errors import StepError


class Run:
    """One training run. Entering it opens everything that it uses; leaving it closes that again.

    Args:
        step: The training step.
        feed: Its data.
        options: The options that `hl.fit` and `Model.fit` have in common.
        model: The model that callbacks see as `self.model`.
        state: What the run trains.
        epochs: The epoch at which the run ends.
        initial_epoch: The epoch at which it begins, unless it is resumed.
        steps_per_epoch: Steps in an epoch; `None` for one pass over the data.
        validation: When and how to validate.
        callbacks: Keras callbacks, in any form that Keras takes.

    Attributes:
        step: As given.
        model: As given.
        epochs: As given.
        progress: The progress of the run; a part of its state.
        callbacks: The callbacks, by their hooks.
        events: The log of the run.
        strategy: How the run uses its devices.
        history: What every epoch reported.
        results: What the last epoch reported.
        acts_within_epochs: Whether there is anything to do between two steps.
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
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation: Validation = NEVER,
        callbacks: Iterable[keras.callbacks.Callback] = (),
    ) -> None:
        self.step, self.model, self.epochs = step, model, whole_number("fit", least=0, epochs=epochs)
        self._feed, self._options, self._state, self._passes = feed, options, state, feed.stream()
        self._steps_per_epoch = steps_per_epoch
        self._steps = feed.length if steps_per_epoch is None else whole_number("fit", steps_per_epoch=steps_per_epoch)
        self._steps_taken = self._steps or 0
        self.progress, self._signals = Progress(epoch=initial_epoch), Signals()
        self.strategy = check_strategy(options.strategy)
        self.history = keras.callbacks.History()
        chosen = [*as_list(callbacks), self.history]
        self.callbacks = Callbacks(chosen, model, {"epochs": epochs, "steps": self._steps, "verbose": options.verbose})
        self.events = Events(chosen, options.verbose, self.progress, options.directory)
        self._validations = Validations(validation, step, self._signals, self.events)
        is_saved = options.directory is not None and options.save is not None
        self._record = Record(state if is_saved else None)
        self._saving = self._new_saving(chosen) if is_saved else NotSaving()
        self._triggers = [*self._saving.triggers, *self._validations.triggers]
        self.acts_within_epochs = bool(self._triggers or self.events.wants_progress)
        self.results: dict[str, Value] = {}
        self._open = contextlib.ExitStack()

    def _new_saving(self, callbacks: list[keras.callbacks.Callback]) -> Saving:
        # In the order in which they are restored: first what may raise an error, then random numbers, then variables.
        parts = {
            "feed": StrictFeed(self._feed) if self._options.resume == "exact" else self._feed,
            "run": self._record,
            "progress": self,
            "step": EpochReports(self.step, self._state, self.progress),
            "state": self._state,
            "validations": self._validations,
            "events": self.events,
            "callbacks": {name: CallbackState(callback) for name, callback in by_name(callbacks).items()},
        }
        return Saving(self._options, parts, self.progress, self._signals, self.events)

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as opened:
            opened.callback(self.events.close)
            opened.callback(self.callbacks.close)
            opened.enter_context(self.strategy.scope())
            opened.enter_context(given.added(self.events.finding))
            opened.enter_context(traced.added(self.events.trace))
            opened.enter_context(self._saving)
            self._open = opened.pop_all()
        self.model.stop_training = False
        take_initial_epoch(self.model)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        with self._open:
            if error is not None:
                self.events.end(self.results, error)

    # ------------------------------------------------- called by the loop, in this order

    def begin(self) -> None:
        """Begins or resumes; runs a validation again that a signal has interrupted."""
        self.callbacks.on_train_begin({})
        self.progress.epoch = max(self.progress.epoch, take_initial_epoch(self.model))
        resumed = self._saving.resume(self._prepare)
        self.strategy.place(_variables_in(self._state))
        asked, recorded = self._options.steps_per_execution, self._record.recorded.get("steps_per_execution")
        self._record.choices = {
            "jit_compile": backend.compiles_kernels(self.step.function.jit_compile),
            "steps_per_execution": steps_a_dispatch(asked, recorded, each_step=self.callbacks.each_step),
        }
        if resumed is not None:
            reread = None if self._feed.seekable else self._feed.name
            resumed |= {"differences": self._record.differences, "reread": reread}
        self.events.append("run_begin", activity="fit", epochs=self.epochs, steps=self._steps, resumed=resumed)
        if self._validations.interrupted:
            (self.after_steps if self.progress.batch else self._after_epoch)()

    def begin_epoch(self) -> None:
        """Begins an epoch, unless the run has resumed within one."""
        if not self.progress.batch:
            self._validations.forget()
            self.step.start_epoch()
            self.callbacks.on_epoch_begin(self.progress.epoch, {})

    def dispatches(self) -> tuple[Callable[[Any], int], Iterator[Any]]:
        """The function that takes the steps of one dispatch, and its argument for each dispatch left in this epoch."""
        left = None if self._steps_per_epoch is None else self._steps_per_epoch - self.progress.batch
        batches = self.strategy.put(iter(self._feed) if left is None else limited(self._passes, left))
        size = self._record.choices["steps_per_execution"]
        if size == 1:
            return self.step.take, batches
        groups = grouped(batches, size, self.progress, [*self._triggers, *self.callbacks.triggers])
        return functools.partial(self.step.take_group, size=size), groups

    def after_steps(self) -> None:
        """After each dispatch: shows progress, validates and saves, if they are due."""
        if self.events.wants_progress:
            self.events.tick(self.step.logs)
        results = self._validations.if_due(self.progress, self.callbacks) if self._validations.triggers else {}
        if not self.model.stop_training:
            self._saving.if_due(results)

    def end_epoch(self) -> None:
        """After the last step of an epoch."""
        self.step.end_epoch()
        self._steps_taken = self.progress.batch
        self.progress.end_epoch()
        self._after_epoch()

    def _after_epoch(self) -> None:
        """Validates, calls the callbacks and saves, in this order."""
        self.results = self.step.logs.reported()
        self.results.update(self._validations.if_due(self.progress, self.callbacks))
        if self._validations.interrupted:
            self._saving.if_due()  # Does not return: a signal asks to stop.
        self.callbacks.on_epoch_end(self.progress.epoch - 1, self.results)
        self.events.append("epoch", values=dict(self.results), steps=self._steps_taken)
        self._saving.if_due(self.results)

    def end(self, finish: Callable[[], None]) -> None:
        """After the last epoch."""
        self._saving.end(self.results)
        finish()
        self.callbacks.on_train_end(self.results)
        self.events.end(self.results)

    # -------------------------------------------------------------------- saving

    def state(self) -> dict[str, Any]:
        """The progress, and whether a callback has ended the run."""
        progress = self.progress
        within = bool(progress.batch or self._validations.interrupted)
        epoch = progress.epoch if progress.batch else progress.epoch - 1
        return vars(progress) | {
            "epoch_begun": epoch if within else None,
            "stopped": bool(self.model.stop_training),
            "epochs": self.epochs,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state()` returned."""
        vars(self.progress).update({name: state[name] for name in vars(self.progress)})
        if state["epoch_begun"] is not None:  # Before callbacks are restored, which this hook may reset.
            self.callbacks.on_epoch_begin(state["epoch_begun"], {})
        # A run that a callback has ended stays ended, unless it is asked for more epochs now.
        self.model.stop_training = state["stopped"] and self.epochs <= state["epochs"]

    def _prepare(self) -> None:
        """Creates all variables, and checks that they will be saved."""
        self.step.prepare(self._feed.peek())
        self._validations.prepare()
        saved = set(map(id, [*named({"state": self._state})[0].values(), global_seed_generator().state]))
        lost = [variable.path for variable in self.step.function.touched if id(variable) not in saved]
        if lost:
            raise StepError(
                f"HL250: {self.step.function.__name__} uses variables that are not in state and would not be saved: "
                f"{', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}.",
                fix="Add what they belong to, such as state={'model': model, 'metric': metric}; in a model, make them "
                "attributes of the model.",
            )


def _variables_in(state: Any) -> list[Variable]:
    """The variables of everything that a run trains, as far as they exist."""
    leaves = optree.tree_leaves(state)
    groups = [[leaf] if isinstance(leaf, keras.Variable) else getattr(leaf, "variables", ()) for leaf in leaves]
    return list({id(variable): variable for group in groups for variable in group}.values())
