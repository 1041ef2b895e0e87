"""Fit, evaluate and predict: the only file that knows the order of things.

    source -> feed -> compiled step -> logs (read late) -> callbacks -> validation -> saving -> events

`train` is the training loop of models and plain steps alike. Read it from top to bottom.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import optree

from handloom._data.feed import Feed
from handloom._keras import keras
from handloom._reporting.batch_logs import call_with_logs
from handloom._reporting.logs import Value
from handloom._reporting.nested import in_progress
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks, as_list
from handloom._run.callback_model import callback_model
from handloom._run.events import Events
from handloom._run.grouping import limited, limited_steps
from handloom._run.interrupt import Interrupts
from handloom._run.options import RunOptions
from handloom._run.plain_step import plain_step
from handloom._run.run import Run
from handloom._run.seed import seed_run
from handloom._run.validation import NEVER, Schedule, Validation, by_function
from handloom._trace.function import Function
from handloom._util.arguments import one_argument_of_data
from handloom._util.every import Every, check_every, every
from handloom._util.findings import given
from handloom._util.progress import Progress
from handloom.backends import backend
from handloom.distribute._strategy import Strategy
from handloom.errors import StepError

AfterStep: TypeAlias = Callable[[Callable[[], Mapping[str, Any]]], None]
"""A function that is called after each step of an evaluation or prediction, with one that reads the values so far."""


@one_argument_of_data("hl.fit", "hl.fit(step, (x, y))")
def fit(
    step: Callable[..., Mapping[str, Any]],
    data: Any,
    *,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    state: Any = None,
    validate: Any = None,
    validate_every: Every = every(epochs=1),
    callbacks: Iterable[keras.callbacks.Callback] = (),
    run_dir: str | Path | None = None,
    resume: str = "auto",
    allow: Sequence[str] = (),
    save: Every | None = every(epochs=1),
    keep: int | None = 3,
    best: str | None = None,
    strategy: Strategy | None = None,
    steps_per_execution: int | str = "auto",
    verbose: str | int = "auto",
    seed: int | None = None,
) -> keras.callbacks.History:
    """Trains with any step: calls the step on each batch, and does everything around it.

    Args:
        step: A function of a batch that trains something and returns a dict of values to report: scalars (averaged
            over the epoch, weighted by the number of examples) and `keras.Metric` objects or results (read at the end
            of the epoch). The step is compiled. If the batch is a tuple, its parts are passed as separate arguments,
            unless the step takes a single argument. If an argument is called `sample_weight`, the averages are
            weighted by its sum instead.
        data: Anything that `hl.Feed` takes, or a feed. Arrays are split into batches of 32; to choose, pass
            `hl.Feed(data, batch_size=64, shuffle=True)`. If a generator is used up before the last epoch, the run
            ends there, with a warning. It stays ended if it is resumed with a new generator, unless more epochs are
            asked for, so that it has trained on the same batches wherever it was stopped.
        epochs: Number of epochs.
        steps_per_epoch: Steps in an epoch; by default one pass over the data. If it is given, an epoch continues
            reading where the previous epoch stopped.
        state: The objects that the step trains, in any structure: `{"model": model, "optimizer": optimizer}`. Callbacks
            find the model as `self.model`; several models (or only layers and variables) as one model that has each as
            an attribute. They find the optimizer as `self.model.optimizer`, several as `self.model.optimizer[name]`.
        validate: A pair `(step, data)`, whose results are reported as `val_...`, or a function without arguments that
            returns such a dict.
        validate_every: When to validate.
        callbacks: Keras callbacks.
        run_dir: A directory for the log and the checkpoints of the run. If `fit` is called again with the same
            directory, it resumes training where it stopped, however it stopped; the result is bitwise identical to
            that of a run without a stop. By default nothing is written.
        resume: `"auto"` to resume if there is a checkpoint; `"exact"` to do so only if the data can continue at its
            exact position; `"never"` to refuse a directory that has checkpoints.
        allow: Patterns of names that may be missing in the checkpoint, exist only there, or have another shape there,
            such as `["state.model.head.*"]`. Missing values stay as they are. Any other difference is an error.
        save: When to save. A run is also saved at its end, and when SIGTERM or Ctrl-C asks it to stop. `None` for
            never.
        keep: How many of the last checkpoints to keep; `None` for all.
        best: A reported value by which the best checkpoint is kept too, such as `"min:val_loss"`. It is saved when
            the value is reported, independently of `save`.
        strategy: How the run uses its devices; by default it uses a single one. See `handloom.distribute`.
        steps_per_execution: How many steps to run in one dispatch, which is faster for small steps; on JAX and
            TensorFlow they are compiled into one program. Steps run one by one if a callback needs every step, or if
            something (saving, validation, a callback of Handloom) is due within that many steps. `"auto"` is 1.
        verbose: 0 for silent, 1 for a progress bar, 2 for one line per epoch; `"auto"` for a bar in a terminal and
            lines elsewhere.
        seed: The seed of everything random in the run: the order of the data, random operations without a seed, and,
            for the layers in `state`, dropout, noise and the initial weights of layers that are not built yet. Objects
            with a seed of their own keep it. The random states of Python, NumPy and the backend are set too.

    Returns:
        The history: `history.history[name]` is a list with one value per epoch.

    Raises:
        ArgumentError: An argument has a value that it does not take; arrays are passed one by one.
        StepError: The step cannot be called with a batch, or returns no dict of scalars.
        DataError: The data cannot be split into batches.

    Example:
        `hl.fit(train_step, (x, y), epochs=5, validate=(test_step, (x_test, y_test)))`
    """
    check_every(validate_every, "validate_every", "hl.every(epochs=1)")
    options = RunOptions(run_dir, resume, allow, save, keep, best, strategy, steps_per_execution, verbose)
    seed_run(seed, state)
    with callback_model(state) as model:
        run = Run(
            *plain_step(step, data, training=True),
            options,
            model=model,
            state=state,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validation=_validation(validate, validate_every),
            callbacks=callbacks,
        )
        return train(run)


def train(run: Run, finish: Callable[[], None] = lambda: None) -> keras.callbacks.History:
    """The training loop. Calls `finish` after the last epoch, before `on_train_end`."""
    with run, Interrupts() as interrupts:
        run.begin()
        progress, logs = run.progress, run.step.logs
        batch_begins = run.callbacks.handled("on_train_batch_begin")
        batch_ends = run.callbacks.handled("on_train_batch_end")
        while run.continues():
            run.begin_epoch()
            take, dispatches = run.dispatches()
            for dispatch in dispatches:
                if batch_begins:
                    batch_begins(progress.batch, {})
                if batch_begins or batch_ends:
                    run.step.heed_changes()
                # DO NOT reorder: between here and the release, an interrupt would leave weights half updated.
                interrupts.held = True
                try:
                    steps = take(dispatch)
                finally:
                    interrupts.release()
                progress.advance(steps)
                if batch_ends:
                    call_with_logs(batch_ends, progress.batch - 1, logs)
                if run.acts_within_epochs:
                    run.after_steps()
                if run.model.stop_training:
                    break
            run.end_epoch()
        run.end(finish)
    return run.history


def evaluate(
    step: ReportingStep, feed: Feed, callbacks: Callbacks, after_step: AfterStep, steps: int | None = None
) -> dict[str, Value]:
    """The loop of an evaluation: one pass over the data, or the given number of steps; returns the reported values."""
    callbacks.model.stop_evaluating = False
    step.start_epoch()
    batch_ends = callbacks.handled("on_test_batch_end")
    with in_progress(step):
        callbacks.on_test_begin({})
        for index, batch in enumerate(limited(feed, steps or None)):
            callbacks.on_test_batch_begin(index, {})
            step.take(batch)
            if batch_ends:
                call_with_logs(batch_ends, index, step.logs)
            after_step(step.logs.reported)
            if callbacks.model.stop_evaluating:
                break
    results = step.results()
    callbacks.on_test_end(results)
    return results


def predict(step: Function, feed: Feed, callbacks: Callbacks, after_step: AfterStep, steps: int | None = None) -> Any:
    """The loop of a prediction; returns the outputs for all batches, concatenated, as NumPy arrays."""
    outputs: list[Any] = []
    callbacks.model.stop_predicting = False
    callbacks.on_predict_begin({})
    for index, batch in enumerate(limited(feed, steps or None)):
        callbacks.on_predict_batch_begin(index, {})
        output = step(batch)
        outputs.append(optree.tree_map(backend.result, output))
        callbacks.on_predict_batch_end(index, {"outputs": output})
        after_step(dict)
        if callbacks.model.stop_predicting:
            break
    callbacks.on_predict_end({})
    # There was a batch: an empty feed raises an error.
    return optree.tree_map(lambda *parts: backend.joined(parts), *outputs)


@contextlib.contextmanager
def standalone(
    activity: str, model: Any, callbacks: Any, verbose: str | int, steps: int | None
) -> Iterator[tuple[Callbacks, AfterStep, Events]]:
    """Everything around an evaluation or prediction outside of training: the callbacks, `after_step`, the events."""
    chosen, progress = as_list(callbacks), Progress()
    events = Events(chosen, verbose, progress, None)

    def after_step(values: Callable[[], Mapping[str, Any]]) -> None:
        progress.advance()
        if events.wants_progress:
            events.tick(values)

    hooks = Callbacks(chosen, model, {"epochs": 1, "steps": steps, "verbose": verbose})
    with contextlib.closing(hooks), contextlib.closing(events), given.added(events.finding):
        events.append("run_begin", activity=activity, epochs=1, steps=steps, resumed=None)
        yield hooks, after_step, events
        events.end({})


def by_step(step: ReportingStep, feed: Feed, when: Schedule, steps: int | None = None) -> Validation:
    """Validation by a test step on held-out data."""
    run = functools.partial(evaluate, step, feed, steps=limited_steps(steps, feed.length))
    return Validation(when, run, lambda: step.prepare(feed.peek()), lambda: step.function.assigned, feed)


def _validation(validate: Any, when: Every) -> Validation:
    if isinstance(validate, Sequence) and len(validate) == 2 and callable(validate[0]):
        return by_step(*plain_step(*validate), when)
    if callable(validate):
        return by_function(validate, when)
    if validate is None:
        return NEVER
    raise StepError(
        f"HL210: validate received an object of type {type(validate).__name__}.",
        fix="Pass a pair (step, data), the step first, or a function without arguments that returns a dict of numbers.",
    )
