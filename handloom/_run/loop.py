"""Fit, evaluate, predict: the only file that knows the order of things.

    source -> feed -> compiled step -> logs (read late) -> callbacks -> validation

`train` is the loop, for models and plain steps alike. Read it from top to bottom.
"""

from __future__ import annotations

import inspect
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optree

from handloom._data.feed import Batch, Feed
from handloom._data.sample_weight import check_weights, weighed_at, weights_in
from handloom._keras import keras, take_initial_epoch
from handloom._reporting.logs import Logs, Value
from handloom._reporting.step import ReportingStep
from handloom._run.callback_list import Callbacks
from handloom._run.callback_model import trained
from handloom._run.grouping import steps_together, taking_together, together
from handloom._run.interrupt import Interrupts, Signals
from handloom._run.saving import NotSaving, SaveOptions, Saving, saving_of
from handloom._run.seed import seed_run
from handloom._run.state import LoopPosition
from handloom._run.validation import BrokenOff, Validation, Validations
from handloom._trace.function import Function
from handloom._util.every import Every, every
from handloom._util.findings import warn
from handloom._util.progress import Progress
from handloom.callbacks import JSONLogger
from handloom.callbacks._display import progress_display
from handloom.errors import ArgumentError, StepError

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
    if not isinstance(validate_every, Every):
        raise ArgumentError(
            "HL026", f"validate_every takes a time such as hl.every(epochs=1); received {validate_every!r}."
        )
    seed_run(seed, state)
    with trained(state) as model:
        return train(
            reporting(step),
            feed_for(step, data, training=True),
            model=model,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validation=_validation(validate, model),
            validate_every=validate_every,
            callbacks=callbacks,
            run_dir=run_dir,
            saves=save_options(run_dir, save, resume, allow, keep, best),
            state=state,
            steps_per_execution=steps_per_execution,
            verbose=verbose,
        )


def save_options(
    run_dir: str | Path | None,
    save: Every | None,
    resume: str,
    allow: Sequence[str],
    keep: int | None,
    best: str | None,
) -> SaveOptions | None:
    """When and where to save; `None` for a run that is not."""
    return None if run_dir is None or save is None else SaveOptions(Path(run_dir), save, resume, allow, keep, best)


def train(
    step: ReportingStep,
    feed: Feed,
    *,
    model: Any,
    state: Any = None,
    epochs: int,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation: Validation | None = None,
    validate_every: Every = every(epochs=1),
    callbacks: Iterable[keras.callbacks.Callback] = (),
    run_dir: str | Path | None = None,
    saves: SaveOptions | None = None,
    steps_per_execution: int | str = "auto",
    verbose: str | int = "auto",
    finish: Callable[[], None] = lambda: None,
) -> keras.callbacks.History:
    """The training loop. What the arguments mean is said at `fit`; `finish` runs after the last epoch."""
    _check_counts(epochs=epochs, steps_per_epoch=steps_per_epoch)
    history, log = keras.callbacks.History(), _log_in(run_dir)
    steps = steps_per_epoch or feed.length
    kept = [*as_list(callbacks), history, *log]
    listeners = [*kept, *progress_display(verbose)]
    progress, logs, signals = Progress(epoch=initial_epoch), step.logs, Signals()
    validations = Validations(validation, validate_every, step, signals)
    model.stop_training = False
    take_initial_epoch(model)
    with (
        Callbacks(listeners, model, {"epochs": epochs, "steps": steps, "verbose": verbose}) as hooks,
        Interrupts() as interrupts,
        saving_of(
            saves,
            {"state": state, "feed": feed, "validations": validations},
            prepares=[lambda: step.prepare(feed.peek()), validations.prepare],
            step=step,
            place=LoopPosition(progress, hooks, model, epochs, validations),
            signals=signals,
            callbacks=kept,
            log=log,
        ) as saving,
    ):
        size = steps_together(steps_per_execution, each_step=hooks.each_step)
        take = step.take if size == 1 else taking_together(step, size)
        between = _Between(progress, logs, model, hooks, validations, saving)
        batch_begins, batch_ends = hooks.heard("on_train_batch_begin"), hooks.heard("on_train_batch_end")
        passes = feed.stream()
        hooks.on_train_begin({})
        progress.epoch = max(progress.epoch, take_initial_epoch(model))
        saving.begin({"steps_per_execution": size}, tell=bool(verbose))
        between.finish_what_a_signal_broke_off()
        while progress.epoch < epochs and not model.stop_training:
            if not progress.batch:  # Else it goes on within an epoch, which has begun.
                validations.forget()
                step.start_epoch()
                hooks.on_epoch_begin(progress.epoch, {})
            batches = iter(feed) if steps_per_epoch is None else _limited(passes, steps_per_epoch - progress.batch)
            for batch in batches if size == 1 else together(batches, size, progress, between.triggers):
                if batch_begins:
                    batch_begins(progress.batch, {})
                # DO NOT reorder: between here and the release an interrupt would find weights half updated.
                interrupts.held = True
                try:
                    take(batch)
                finally:
                    interrupts.release()
                progress.advance(1 if size == 1 else len(batch))
                if batch_ends:
                    batch_ends(progress.batch - 1, logs)
                if between.acts_within_epochs:
                    between.steps()
                if model.stop_training:
                    break
            step.end_epoch()
            progress.end_epoch()
            between.epochs()
        saving.end(between.results)
        finish()
        hooks.on_train_end(between.results)
    return history


class _Between:
    """What happens between two steps and between two epochs: validation, callbacks and saving, in this order.

    Attributes:
        acts_within_epochs: Whether there is anything to be done between two steps.
        triggers: When something is due, callbacks included.
        results: What the last epoch reported.
    """

    def __init__(
        self,
        progress: Progress,
        logs: Logs,
        model: Any,
        hooks: Callbacks,
        validations: Validations,
        saving: Saving | NotSaving,
    ) -> None:
        self._progress, self._logs, self._model, self._hooks = progress, logs, model, hooks
        self._validations, self._saving = validations, saving
        self.acts_within_epochs = bool(saving.triggers or validations.triggers)
        self.triggers = [*saving.triggers, *validations.triggers, *hooks.triggers]
        self.results: dict[str, Value] = {}

    def steps(self) -> None:
        """After a step, or several in one dispatch."""
        found = self._validations.if_due(self._progress, self._hooks) if self._validations.triggers else {}
        if not self._model.stop_training:
            self._saving.if_due(found)

    def epochs(self) -> None:
        """After an epoch."""
        self.results = self._logs.reported()
        self.results.update(self._validations.if_due(self._progress, self._hooks))
        if self._validations.broken_off:
            self._saving.save_and_stop()
        self._hooks.on_epoch_end(self._progress.epoch - 1, self.results)
        self._saving.if_due(self.results)

    def finish_what_a_signal_broke_off(self) -> None:
        """Validates, if a signal came while the run that is gone on with did so."""
        if self._validations.broken_off:
            (self.steps if self._progress.batch else self.epochs)()


def evaluate(
    step: ReportingStep,
    feed: Feed,
    *,
    hooks: Callbacks,
    model: Any,
    steps: int | None = None,
    signals: Signals | None = None,
) -> dict[str, Value]:
    """The loop of evaluation: one pass, or so many steps of it; broken off by a signal, if any are waited for."""
    model.stop_evaluating = False
    step.start_epoch()
    hooks.on_test_begin({})
    for index, batch in enumerate(_one_pass(feed, steps)):
        hooks.on_test_batch_begin(index, {})
        step.take(batch)
        hooks.on_test_batch_end(index, step.logs)
        if signals and signals.received is not None:
            raise BrokenOff
        if model.stop_evaluating:
            break
    results = step.logs.reported()
    hooks.on_test_end(results)
    return results


def predict(step: Function, feed: Feed, *, hooks: Callbacks, model: Any, steps: int | None = None) -> Any:
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
        if model.stop_predicting:
            break
    hooks.on_predict_end({})
    assert structure is not None  # A feed without a batch is an error of its own.
    return structure.unflatten([_joined(parts) for parts in zip(*outputs, strict=True)])


def reporting(step: Callable[..., Any], **options: Any) -> ReportingStep:
    """A plain step, to be called with batches and reported."""
    if not callable(step):
        raise StepError("HL209", f"A step is a function of a batch; received {step!r} (of type {type(step).__name__}).")
    position = _position_of_weights(step)
    return ReportingStep(step, unpacks=_unpacks(step), weighed=lambda *batch: weighed_at(batch, position), **options)


def feed_for(step: Callable[..., Any], data: Any, *, training: bool = False) -> Feed:
    """Data as a feed, its sample weights checked."""
    feed, position = data.view() if isinstance(data, Feed) else Feed(data), _position_of_weights(step)
    if position is not None:
        feed.check(lambda batch: check_weights(weights_in(None, batch[position : position + 1]), training=training))
    return feed


def _unpacks(step: Callable[..., Any]) -> bool:
    """Whether the parts of a batch are the arguments of a step."""
    parameters = _parameters(step)
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    return len(required) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _position_of_weights(step: Callable[..., Any]) -> int | None:
    names = [parameter.name for parameter in _parameters(step)]
    return names.index("sample_weight") if "sample_weight" in names and _unpacks(step) else None


def _limited(passes: Iterator[Batch], steps: int) -> Iterator[Batch]:
    """So many steps of passes that follow on each other."""
    given = 0
    for batch in islice(passes, steps):
        given += 1
        yield batch
    if given < steps:
        warn(
            "HL709",
            f"The data ran out after {given} of {steps} steps of an epoch: it can be read only once. Pass a function "
            "that returns a new iterator each time, or set steps_per_epoch to what there is.",
        )


def _one_pass(feed: Feed, steps: int | None) -> Iterator[Batch]:
    """One pass, or so many steps of it."""
    given = 0
    for batch in islice(feed, steps or None):
        given += 1
        yield batch
    if steps and given < steps:
        warn("HL710", f"The data ran out after {given} of {steps} steps: it gives no more.")


def validation_by_step(step: ReportingStep, feed: Feed, model: Any, steps: int | None = None) -> Validation:
    """Validation by a test step on held-out data."""
    return Validation(
        lambda hooks, signals: evaluate(step, feed, hooks=hooks, model=model, steps=steps, signals=signals),
        lambda: step.prepare(feed.peek()),
        lambda: step.function.assigned,
        feed,
    )


def _validation(validate: Any, model: Any) -> Validation | None:
    """What `validate=` says, as a function of the callbacks."""
    if validate is None:
        return None
    if isinstance(validate, Sequence) and len(validate) == 2 and callable(validate[0]):
        return validation_by_step(reporting(validate[0]), feed_for(*validate), model)
    if callable(validate):
        return Validation(lambda hooks, _: _asked(validate, hooks))
    raise StepError(
        "HL210",
        "validate takes a pair (step, data), or a function without arguments that returns a dict of numbers; received "
        f"{reprlib.repr(validate)} (of type {type(validate).__name__}).",
    )


def _asked(validate: Callable[[], Any], hooks: Callbacks) -> dict[str, Value]:
    hooks.on_test_begin({})
    results = _checked_results(validate())
    hooks.on_test_end(results)
    return results


def _checked_results(results: Any) -> dict[str, Value]:
    if not isinstance(results, Mapping):
        raise StepError(
            "HL211",
            "The function given as validate must return a dict of numbers, such as {'loss': 0.1}; it returned "
            f"{results!r}.",
        )
    return {str(name): float(ops.convert_to_numpy(value)) for name, value in results.items()}


def _log_in(run_dir: str | Path | None) -> list[JSONLogger]:
    return [] if run_dir is None else [JSONLogger(Path(run_dir) / "log.jsonl")]


def as_list(callbacks: Any) -> list[keras.callbacks.Callback]:
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    return list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]


def _parameters(step: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # A builtin, perhaps.
        return []
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return [parameter for parameter in parameters if parameter.kind not in named]


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        least, optional = (1, True) if name == "steps_per_epoch" else (0, False)
        if count is None and optional:
            continue
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < least:
            raise ArgumentError("HL027", f"{name} takes a whole number, at least {least}; received {count!r}.")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
