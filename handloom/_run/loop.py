"""Fit, evaluate, predict: the only file that knows the order of things.

    source -> feed -> compiled step -> logs (read late) -> callbacks -> validation -> saving -> events

`train` is the loop, for models and plain steps alike. Read it from top to bottom.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optree

from handloom._data.feed import Batch, Feed
from handloom._keras import keras
from handloom._reporting.logs import Value
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks
from handloom._run.callback_model import trained
from handloom._run.events import Events
from handloom._run.interrupt import Interrupts, Signals
from handloom._run.options import RunOptions, as_list
from handloom._run.plain_step import feed_for, reporting
from handloom._run.run import Run
from handloom._run.seed import seed_run
from handloom._run.validation import BrokenOff, Validation, by_function, check_validate, is_pair
from handloom._trace.function import Function
from handloom._util.arguments import whole_number
from handloom._util.every import AfterEpochs, Every, check_every, every
from handloom._util.findings import given, warn
from handloom._util.progress import Progress
from handloom.callbacks._display import progress_display
from handloom.callbacks._event_reader import EventReader
from handloom.distribute._strategy import Strategy

ops = keras.ops


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
    """Trains with any step: calls it on each batch, and does what surrounds it.

    Args:
        step: A function of a batch that trains something and returns what is to be reported: a dict of scalars
            (averaged over the epoch, weighted by the number of examples) and of `keras.Metric` objects or results
            (asked at its end). It is compiled. A batch that is a tuple is passed as that many arguments, unless the
            step takes a single one; if an argument is called `sample_weight`, its sum weights the averages instead.
        data: What `hl.Feed` takes, or a feed. Arrays come in batches of 32; to choose, pass
            `hl.Feed(data, batch_size=64, shuffle=True)`.
        epochs: Number of epochs.
        steps_per_epoch: Steps in an epoch; by default one pass over the data. With it, passes follow on each other.
        state: What the step trains, in any structure: `{"model": model, "optimizer": optimizer}`. Callbacks find the
            model in it as `self.model`; several models (or layers and variables alone) as one model that has each
            under its name; the optimizer as `self.model.optimizer`, several as `self.model.optimizer[name]`.
        validate: A pair `(step, data)`, whose results are reported as `val_...`, or a function without arguments that
            returns such a dict.
        validate_every: When to validate.
        callbacks: Keras callbacks.
        run_dir: A directory for the log and the checkpoints of the run. Called again with it, after whatever end,
            training goes on where it stood, to the bit. By default nothing is written anywhere.
        resume: `"auto"` to go on if there is a checkpoint; `"exact"` to do so only if the data can go on at its exact
            place; `"never"` to refuse a directory that has one.
        allow: Patterns of names that a checkpoint to go on from may lack, have besides, or have in another shape, such
            as `["state.model.head.*"]`: what is missing stays as it is. Anything else that differs is an error.
        save: When to save; it is also done at the end, and when SIGTERM or Ctrl-C asks to stop. `None` for never.
        keep: How many of the last checkpoints to keep; `None` for all.
        best: `"min:val_loss"` or the like, to keep the best by a reported value besides; saved when that is reported,
            whatever `save` says.
        strategy: How the run uses its devices; by default on a single one. See `handloom.distribute`.
        steps_per_execution: How many steps to dispatch together, which costs less for small steps: on JAX and
            TensorFlow as one program. It is one by one where a callback is to be called at each step, or something
            (saving, validation, a callback of Handloom's) is due within so many; `"auto"` is one by one.
        verbose: 0 for silence, 1 for a progress bar, 2 for a line an epoch; `"auto"` for a bar in a terminal and lines
            elsewhere.
        seed: One number for all that is random in the run: the order of data, unseeded random operations, and of what
            is in `state` dropout, noise and the initial weights of layers not yet built. What has a seed of its own
            keeps it. The random states of Python, NumPy and the backend are set by it.

    Returns:
        The history: `history.history[name]` is a list with one value an epoch.

    Raises:
        StepError: If the step cannot be called with a batch, or returns no dict of scalars.
        DataError: If the data cannot be batched.

    Example:
        `hl.fit(train_step, (x, y), epochs=5, validate=(test_step, (x_test, y_test)))`
    """
    check_every(validate_every, "validate_every", "hl.every(epochs=1)")
    check_validate(validate)
    options = RunOptions(run_dir, resume, allow, save, keep, best, strategy, steps_per_execution, verbose)
    seed_run(seed, state)
    with trained(state) as model:
        validation = None
        if is_pair(validate):
            validation = by_step(reporting(validate[0]), feed_for(*validate), model)
        elif validate is not None:
            validation = by_function(validate)
        return train(
            reporting(step),
            feed_for(step, data, training=True),
            options,
            model=model,
            state=state,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validation=validation,
            validate_every=validate_every,
            callbacks=callbacks,
        )


def train(
    step: ReportingStep,
    feed: Feed,
    options: RunOptions,
    *,
    model: Any,
    state: Any = None,
    epochs: int,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation: Validation | None = None,
    validate_every: Every | AfterEpochs = every(epochs=1),
    callbacks: Iterable[keras.callbacks.Callback] = (),
    finish: Callable[[], None] = lambda: None,
) -> keras.callbacks.History:
    """The training loop. What the arguments mean is said at `fit`; `finish` runs after the last epoch."""
    whole_number("fit", least=0, epochs=epochs)
    steps = feed.length if steps_per_epoch is None else whole_number("fit", steps_per_epoch=steps_per_epoch)
    with (
        Run(
            step,
            feed,
            options,
            model=model,
            state=state,
            epochs=epochs,
            initial_epoch=initial_epoch,
            steps=steps,
            validation=validation,
            validate_every=validate_every,
            callbacks=callbacks,
        ) as run,
        Interrupts() as interrupts,
    ):
        run.begin()
        progress, logs, callbacks_, passes = run.progress, step.logs, run.callbacks, feed.stream()
        batch_begins = callbacks_.handlers("on_train_batch_begin")
        batch_ends = callbacks_.handlers("on_train_batch_end")
        while progress.epoch < epochs and not model.stop_training:
            run.begin_epoch()
            batches = iter(feed) if steps_per_epoch is None else _limited(passes, steps_per_epoch - progress.batch)
            take, groups, several = run.dispatches(batches)
            for group in groups:
                if batch_begins:
                    batch_begins(progress.batch, {})
                # DO NOT reorder: between here and the release an interrupt would find weights half updated.
                interrupts.held = True
                try:
                    take(group)
                finally:
                    interrupts.release()
                progress.advance(len(group) if several else 1)
                if batch_ends:
                    batch_ends(progress.batch - 1, logs)
                if run.acts_within_epochs:
                    run.after_steps()
                if model.stop_training:
                    break
            step.end_epoch()
            run.finish_epoch()
        run.end(finish)
    return run.history


def evaluate(
    step: ReportingStep,
    feed: Feed,
    *,
    hooks: Callbacks,
    model: Any,
    steps: int | None = None,
    signals: Signals | None = None,
    after_step: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Value]:
    """The loop of evaluation: one pass, or so many steps of it; broken off by a signal, if any are waited for."""
    model.stop_evaluating = False
    step.start_epoch()
    hooks.on_test_begin({})
    for index, batch in enumerate(_one_pass(feed, steps)):
        hooks.on_test_batch_begin(index, {})
        step.take(batch)
        hooks.on_test_batch_end(index, step.logs)
        if after_step:
            after_step(step.logs)
        if signals and signals.received is not None:
            raise BrokenOff
        if model.stop_evaluating:
            break
    results = step.logs.reported()
    hooks.on_test_end(results)
    return results


def predict(
    step: Function,
    feed: Feed,
    *,
    hooks: Callbacks,
    model: Any,
    steps: int | None = None,
    after_step: Callable[[Mapping[str, Any]], None],
) -> Any:
    """The loop of prediction: the outputs for all batches, one after the other, as NumPy arrays."""
    outputs: list[list[Any]] = []
    structure = None
    model.stop_predicting = False
    hooks.on_predict_begin({})
    for index, batch in enumerate(_one_pass(feed, steps)):
        hooks.on_predict_batch_begin(index, {})
        output = step(batch)
        leaves, structure = optree.tree_flatten(output)
        outputs.append([ops.convert_to_numpy(leaf) for leaf in leaves])
        hooks.on_predict_batch_end(index, {"outputs": output})
        after_step({})
        if model.stop_predicting:
            break
    hooks.on_predict_end({})
    assert structure is not None  # A feed without a batch is an error of its own.
    return structure.unflatten([_joined(parts) for parts in zip(*outputs, strict=True)])


@contextlib.contextmanager
def standalone(
    activity: str, model: Any, callbacks: Any, verbose: str | int, steps: int | None
) -> Iterator[tuple[Callbacks, Callable[[Mapping[str, Any]], None], Events]]:
    """What surrounds an evaluation or prediction outside of training: callbacks, what to call after a step, events."""
    mine, progress = as_list(callbacks), Progress()
    readers = [*(callback for callback in mine if isinstance(callback, EventReader)), *progress_display(verbose)]
    with contextlib.ExitStack() as opened:
        hooks = opened.enter_context(Callbacks(mine, model, {"epochs": 1, "steps": steps, "verbose": verbose}))
        events = Events(readers, progress)
        opened.callback(events.close)
        opened.enter_context(given.added(events.finding))

        def after_step(logs: Mapping[str, Any]) -> None:
            progress.advance()
            if events.wants_progress:
                events.tick(logs)

        events.append("run_begin", activity=activity, epochs=1, steps=steps, resumed=None)
        yield hooks, after_step, events
        events.end({})


def by_step(step: ReportingStep, feed: Feed, model: Any, steps: int | None = None) -> Validation:
    """Validation by a test step on held-out data."""
    return Validation(
        lambda hooks, signals: evaluate(step, feed, hooks=hooks, model=model, steps=steps, signals=signals),
        lambda: step.prepare(feed.peek()),
        lambda: step.function.assigned,
        feed,
    )


def _limited(passes: Iterator[Batch], steps: int) -> Iterator[Batch]:
    """So many steps of passes that follow on each other."""
    count = 0
    for batch in islice(passes, steps):
        count += 1
        yield batch
    if count < steps:
        warn(
            f"HL703: The data ran out after {count} of {steps} steps of an epoch: it can be read only once. Pass a function "
            "that returns a new iterator each time, or set steps_per_epoch to what there is.",
        )


def _one_pass(feed: Feed, steps: int | None) -> Iterator[Batch]:
    """One pass, or so many steps of it."""
    count = 0
    for batch in islice(feed, steps or None):
        count += 1
        yield batch
    if steps and count < steps:
        warn(f"HL704: The data ran out after {count} of {steps} steps: it gives no more.")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
