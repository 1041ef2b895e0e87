"""One run: its progress, and everything around its steps."""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import optree

from handloom._data.feed import Feed
from handloom._keras import Variable, global_seed_generator, keras, mark_built, take_initial_epoch
from handloom._reporting.logs import Value
from handloom._reporting.nested import in_progress, outer_epochs_kept
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks, as_list, by_name
from handloom._run.events import Events
from handloom._run.grouping import grouped, limited, limited_epochs, limited_steps
from handloom._run.interrupt import Signals
from handloom._run.options import RunOptions
from handloom._run.saving import NotSaving, Saving
from handloom._run.state import EpochReports, Part, Record, restore_exactly
from handloom._run.validation import NEVER, Validation, Validations
from handloom._trace.function import Function, traced
from handloom._trace.python_state import PythonState
from handloom._util.arguments import whole_number
from handloom._util.findings import given, warn
from handloom._util.first_few import first_few
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.callbacks import callback_state, restore_callback
from handloom.checkpoint.names import KERAS_OBJECTS, named
from handloom.distribute._strategy import check_strategy
from handloom.errors import StepError


class Run:
    """One training run. Entering it opens everything that it uses; leaving it closes that again.

    Args:
        step: The training step.
        feed: Its data.
        options: The options that `hl.fit` and `Model.fit` have in common.
        model: The model that callbacks see as `self.model`.
        state: The objects that the run trains.
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
        history: The reported values of all epochs.
        results: The reported values of the last epoch.
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
        self.step, self.model = step, model
        self.epochs = limited_epochs(whole_number("fit", least=0, epochs=epochs))
        self._feed, self._options, self._state, self._passes = feed, options, state, feed.stream()
        if steps_per_epoch is not None:
            steps_per_epoch = whole_number("fit", steps_per_epoch=steps_per_epoch)
        self._steps_per_epoch = limited_steps(steps_per_epoch, feed.length)
        self._steps = self._steps_per_epoch or feed.length
        self.progress, self._signals = Progress(epoch=initial_epoch), Signals()
        self.strategy = check_strategy(options.strategy)
        self.history = keras.callbacks.History()
        chosen = [*as_list(callbacks), self.history]
        self.callbacks = Callbacks(
            chosen, model, {"epochs": self.epochs, "steps": self._steps, "verbose": options.verbose}
        )
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
        feed: Any = self._feed
        if self._options.resume == "exact":
            feed = Part(feed.state, functools.partial(restore_exactly, feed))
        parts = {
            "feed": feed,
            "run": self._record,
            "progress": self,
            "step": EpochReports(self.step, self._state, self.progress),
            "state": self._state,
            "validations": self._validations,
            "events": self.events,
            "callbacks": {
                name: Part(functools.partial(callback_state, callback), functools.partial(restore_callback, callback))
                for name, callback in by_name(callbacks).items()
            },
        }
        return Saving(self._options, parts, self.progress, self._signals, self.events)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            opened.callback(self.events.close)
            opened.callback(self.callbacks.close)
            opened.enter_context(self.strategy.scope())
            opened.enter_context(outer_epochs_kept(self.step))
            opened.enter_context(in_progress(self.step))
            opened.enter_context(given.added(self.events.finding))
            opened.enter_context(traced.added(self.events.trace))
            opened.push(self._end_events)  # After the last checkpoint, the event of which comes first.
            opened.enter_context(self._saving)
            self._open = opened.pop_all()
        self.model.stop_training = False
        take_initial_epoch(self.model)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._open.__exit__(kind, error, traceback)

    def _end_events(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self.events.end(self.results, error)

    # ------------------------------------------------- called by the loop, in this order

    def begin(self) -> None:
        """Begins or resumes; runs a validation again that a signal has interrupted."""
        self.callbacks.on_train_begin({})
        self.progress.epoch = max(self.progress.epoch, take_initial_epoch(self.model))
        resumed = self._saving.resume(self._prepare, self._record.adapt)
        self.strategy.place(_variables_in(self._state))
        asked, recorded = self._options.steps_per_execution, self._record.saved["choices"].get("steps_per_execution")
        size = (recorded or 1) if asked == "auto" else int(asked)
        self._record.choices = {
            "jit_compile": backend.compiles_kernels(self.step.function.jit_compile),
            "steps_per_execution": self.strategy.agree(1 if self.callbacks.each_step else size),
        }
        if resumed is not None:
            resumed["differences"] = self._record.differences
            resumed["reread"] = None if self._feed.seekable else self._feed.name
        self.events.append("run_begin", activity="fit", epochs=self.epochs, steps=self._steps, resumed=resumed)
        if self._validations.interrupted and self.progress.batch:
            self.after_steps()
        elif self._validations.interrupted:
            self._after_epoch(self._steps or 0)

    def continues(self) -> bool:
        """Whether there is another epoch: not if the data can be read only once and has no further batch."""
        at, reads_on = self.progress, self._steps_per_epoch is not None and not self._feed.repeatable
        if reads_on and 0 < at.epoch < self.epochs and not at.batch and not self.model.stop_training:
            first = list(itertools.islice(self._passes, 1))
            self._passes = itertools.chain(first, self._passes)
            if not first:
                self._stop_without_data()
        return at.epoch < self.epochs and not self.model.stop_training

    def _stop_without_data(self) -> None:
        """Ends the run as a callback does, so that a run resumed from its last checkpoint has ended too."""
        self.model.stop_training = True
        warn(
            f"HL759: {self._feed.name} has no more batches; the run ends after epoch {self.progress.epoch} of "
            f"{self.epochs}.",
            fix="Pass a function that returns a new generator each time (without calling it).",
        )

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
            self.events.tick(self.step.logs.reported)
        results: dict[str, Value] = {}
        if self._validations.triggers:
            results = self._validations.if_due(self.progress, self.callbacks)
            self.step.heed_changes()
        if not self.model.stop_training:
            self._saving.if_due(results)

    def end_epoch(self) -> None:
        """After the last step of an epoch."""
        self.step.end_epoch()
        mark_built(self.model)  # Callbacks may save its weights.
        steps, stopped = self.progress.batch, self.model.stop_training
        self.progress.end_epoch()
        ran_out = not self._feed.repeatable and not stopped and steps != self._steps_per_epoch
        if ran_out and self.progress.epoch < self.epochs:
            self._stop_without_data()
        self._after_epoch(steps)

    def _after_epoch(self, steps: int) -> None:
        """Validates, calls the callbacks and saves, in this order."""
        self.results = self.step.results()
        self.results |= self._validations.if_due(self.progress, self.callbacks)
        if self._validations.interrupted:
            self._saving.if_due({})  # Does not return: a signal asks to stop.
        self.callbacks.on_epoch_end(self.progress.epoch - 1, self.results)
        self.model.stop_training = self.strategy.agree(self.model.stop_training)
        self.events.append("epoch", values=dict(self.results), steps=steps)
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
        begun = None
        if self.progress.batch:
            begun = self.progress.epoch
        elif self._validations.interrupted:
            begun = self.progress.epoch - 1
        stopped = bool(self.model.stop_training)
        return vars(self.progress) | {"epoch_begun": begun, "stopped": stopped, "epochs": self.epochs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state()`."""
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
        function = self.step.function
        if function.unsaved:
            raise StepError(
                f"HL258: {function.__name__} uses {' and '.join(function.unsaved)}, which a checkpoint cannot hold.",
                fix="Keep the state in keras.Variable, draw by keras.random with a SeedGenerator, and train by "
                "Keras optimizers; or run without run_dir, or with save=None.",
            )
        lost = [variable for variable in function.touched if id(variable) not in saved]
        if lost:
            raise StepError(
                f"HL250: {function.__name__} uses variables that are not in state and would not be saved: "
                f"{first_few([variable.path for variable in lost], 5)}.",
                fix=f"Add what they belong to: state={{{'..., ' if self._state else ''}{_owners(function, lost)}}}; "
                "in a model of your own, make it an attribute instead.",
            )


def _owners(function: Function, lost: Iterable[Variable]) -> str:
    """What the variables belong to, as items of `state`, by the names in the step."""
    left, found = set(map(id, lost)), []
    for path, thing in sorted(PythonState(function.python_function).things, key=lambda each: len(each[0])):
        if not isinstance(thing, KERAS_OBJECTS):
            continue
        variables = [thing.state] if isinstance(thing, keras.random.SeedGenerator) else thing.variables
        if not left.isdisjoint(map(id, variables)):
            left.difference_update(map(id, variables))
            name = "_".join(re.findall(r"\w+", path))
            found.append(f"'{name}': {path}")
    return ", ".join([*found, *(["'name': variable"] if left else [])])


def _variables_in(state: Any) -> list[Variable]:
    """The variables of everything that a run trains, as far as they exist."""
    leaves = optree.tree_leaves(state)
    groups = [[leaf] if isinstance(leaf, keras.Variable) else getattr(leaf, "variables", ()) for leaf in leaves]
    return list({id(variable): variable for group in groups for variable in group}.values())
