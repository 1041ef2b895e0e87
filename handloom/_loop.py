"""Fit, evaluate, predict: the only file that knows the order of things.

    source -> feed -> compiled step -> logs (read late) -> callbacks -> validation

`train` is the loop, for models and plain steps alike. Read it from top to bottom.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optree

from handloom._callbacks import Callbacks
from handloom._data import Batch, Feed
from handloom._every import Every, every
from handloom._function import Function
from handloom._interrupt import Interrupts
from handloom._keras import keras, take_initial_epoch
from handloom._logs import Value
from handloom._progress import Progress
from handloom._reporting import ReportingStep
from handloom._sample_weight import check_weights, weighed_at, weights_in
from handloom._saving import SaveOptions, saving_of
from handloom._seed import seed_run
from handloom._trained import trained
from handloom._warn import warn
from handloom.callbacks import JSONLogger
from handloom.callbacks._display import progress_display
from handloom.errors import StepError

ops = keras.ops


@dataclasses.dataclass(frozen=True)
class Validation:
    """How a run is validated.

    Attributes:
        run: Validates, and returns the results.
        prepare: Compiles what that needs, and makes its variables.
    """

    run: Callable[[Callbacks], dict[str, Value]]
    prepare: Callable[[], None] = lambda: None

    @classmethod
    def by_step(cls, step: ReportingStep, feed: Feed, model: Any, steps: int | None = None) -> Validation:
        """Validation by a test step on held-out data."""
        return cls(
            lambda hooks: evaluate(step, feed, hooks=hooks, model=model, steps=steps),
            lambda: step.prepare(feed.peek()),
        )


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
    save: Every | None = every(epochs=1),
    keep: int | None = 3,
    best: str | None = None,
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
        save: When to save; it is also done at the end, and when SIGTERM or Ctrl-C asks to stop. `None` for never.
        keep: How many of the last checkpoints to keep; `None` for all.
        best: `"min:val_loss"` or the like, to keep the best by a reported value besides.
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
        raise TypeError(f"validate_every takes a time such as hl.every(epochs=1); received {validate_every!r}.")
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
            saves=save_options(run_dir, save, resume, keep, best),
            state=state,
            verbose=verbose,
        )


def save_options(
    run_dir: str | Path | None, save: Every | None, resume: str, keep: int | None, best: str | None
) -> SaveOptions | None:
    """When and where to save; `None` for a run that is not."""
    return None if run_dir is None or save is None else SaveOptions(Path(run_dir), save, resume, keep, best)


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
    verbose: str | int = "auto",
    finish: Callable[[], None] = lambda: None,
) -> keras.callbacks.History:
    """The training loop. What the arguments mean is said at `fit`; `finish` runs after the last epoch."""
    _check_counts(epochs=epochs, steps_per_epoch=steps_per_epoch)
    history = keras.callbacks.History()
    steps = steps_per_epoch or feed.length
    kept = [*as_list(callbacks), history, *_writers(run_dir)]
    listeners = [*kept, *progress_display(verbose)]
    progress, take, logs, results = Progress(epoch=initial_epoch), step.take, step.logs, dict[str, Value]()
    validations = _Validations(validation, validate_every, step)
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
            progress=progress,
            hooks=hooks,
            callbacks=kept,
        ) as saving,
    ):
        save_if_due = saving.if_due if saves else None
        batch_begins, batch_ends = hooks.heard("on_train_batch_begin"), hooks.heard("on_train_batch_end")
        passes = feed.stream()
        hooks.on_train_begin({})
        progress.epoch = max(progress.epoch, take_initial_epoch(model))
        saving.begin(tell=bool(verbose))
        while progress.epoch < epochs and not model.stop_training:
            epoch = progress.epoch
            if not progress.batch:  # Else it goes on within an epoch, which has begun.
                validations.forget()
                step.start_epoch()
                hooks.on_epoch_begin(epoch, {})
            for batch in feed if steps_per_epoch is None else _limited(passes, steps_per_epoch - progress.batch):
                if batch_begins:
                    batch_begins(progress.batch, {})
                # DO NOT reorder: between here and the release an interrupt would find weights half updated.
                interrupts.held = True
                try:
                    take(batch)
                finally:
                    interrupts.release()
                progress.step += 1
                progress.batch += 1
                if batch_ends:
                    batch_ends(progress.batch - 1, logs)
                if validations.within_epochs:
                    validations.if_due(progress, hooks)
                if model.stop_training:
                    break
                if save_if_due:
                    save_if_due()
            step.end_epoch()
            progress.end_epoch()
            results = logs.reported()
            results.update(validations.if_due(progress, hooks))
            hooks.on_epoch_end(epoch, results)
            saving.if_due(results)
        saving.end(results)
        finish()
        hooks.on_train_end(results)
    return history


def evaluate(
    step: ReportingStep,
    feed: Feed,
    *,
    hooks: Callbacks,
    model: Any,
    steps: int | None = None,
) -> dict[str, Value]:
    """The loop of evaluation: one pass, or so many steps of it."""
    model.stop_evaluating = False
    step.start_epoch()
    hooks.on_test_begin({})
    for index, batch in enumerate(_one_pass(feed, steps)):
        hooks.on_test_batch_begin(index, {})
        step.take(batch)
        hooks.on_test_batch_end(index, step.logs)
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
        raise StepError(f"A step is a function of a batch; received {step!r} (of type {type(step).__name__}).")
    position = _position_of_weights(step)
    return ReportingStep(step, unpacks=_unpacks(step), weighed=lambda *batch: weighed_at(batch, position), **options)


def feed_for(step: Callable[..., Any], data: Any, *, training: bool = False) -> Feed:
    """Data as a feed, its sample weights checked; a feed is one already, and left as it is."""
    if isinstance(data, Feed):
        return data
    feed, position = Feed(data), _position_of_weights(step)
    if position is not None:
        feed.check(lambda batch: check_weights(weights_in(None, *batch[position : position + 1]), training=training))
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
            f"The data ran out after {given} of {steps} steps of an epoch: it can be read only once. Pass a function "
            "that returns a new iterator each time, or set steps_per_epoch to what there is."
        )


def _one_pass(feed: Feed, steps: int | None) -> Iterator[Batch]:
    """One pass, or so many steps of it."""
    given = 0
    for batch in islice(feed, steps or None):
        given += 1
        yield batch
    if steps and given < steps:
        warn(f"The data ran out after {given} of {steps} steps: it gives no more.")


class _Validations:
    """Validates when it is time, and keeps the last results for the end of the epoch."""

    def __init__(self, validation: Validation | None, when: Every, training: ReportingStep) -> None:
        self._validation, self._when, self._training = validation, when, training
        self._results: dict[str, Value] = {}
        self._last_time = time.perf_counter()
        self.within_epochs = validation is not None and getattr(when, "epochs", 0) is None

    def if_due(self, progress: Progress, hooks: Callbacks) -> dict[str, Value]:
        """Validates if it is time; returns the last results at the end of an epoch."""
        if self._validation is None:
            return {}
        if self._when.due(progress, time.perf_counter() - self._last_time):
            with self._training.metrics_kept():
                results = self._validation.run(hooks)
            self._results = {f"val_{name}": value for name, value in results.items()}
            self._last_time = time.perf_counter()
        return self._results if progress.batch == 0 else {}

    def prepare(self) -> None:
        """Compiles what validation needs."""
        if self._validation is not None:
            self._validation.prepare()

    def state(self) -> dict[str, Value]:
        """The last results of this epoch."""
        return dict(self._results)

    def restore(self, state: Mapping[str, Value]) -> None:
        """Goes on with them."""
        self._results = dict(state)

    def forget(self) -> None:
        """A new epoch has its own results."""
        self._results = {}


def _validation(validate: Any, model: Any) -> Validation | None:
    """What `validate=` says, as a function of the callbacks."""
    if validate is None:
        return None
    if isinstance(validate, Sequence) and len(validate) == 2 and callable(validate[0]):
        return Validation.by_step(reporting(validate[0]), feed_for(*validate), model)
    if callable(validate):
        return Validation(functools.partial(_asked, validate))
    raise StepError(
        "validate takes a pair (step, data), or a function without arguments that returns a dict of numbers; received "
        f"{reprlib.repr(validate)} (of type {type(validate).__name__})."
    )


def _asked(validate: Callable[[], Any], hooks: Callbacks) -> dict[str, Value]:
    hooks.on_test_begin({})
    results = _checked_results(validate())
    hooks.on_test_end(results)
    return results


def _checked_results(results: Any) -> dict[str, Value]:
    if not isinstance(results, Mapping):
        raise StepError(
            "The function given as validate must return a dict of numbers, such as {'loss': 0.1}; it returned "
            f"{results!r}."
        )
    return {str(name): float(ops.convert_to_numpy(value)) for name, value in results.items()}


def _writers(run_dir: str | Path | None) -> list[keras.callbacks.Callback]:
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
            raise ValueError(f"{name} takes a whole number, at least {least}; received {count!r}.")


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
