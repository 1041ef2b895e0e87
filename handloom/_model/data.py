"""Data as `keras.Model.fit` takes it: `x`, `y` and `sample_weight` apart, or a source that gives all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from handloom._data.class_weight import ClassWeight, class_weights, label_check
from handloom._data.feed import Feed
from handloom._data.sample_weight import ThirdPart, check_weights, weights_in, weights_in_batch
from handloom._data.sources import is_arrays
from handloom._keras import keras
from handloom.errors import DataError

Parts: TypeAlias = tuple[Any, Any, Any]
"""Inputs, targets, sample weights."""


def model_feed(
    model: keras.Model,
    parts: Parts,
    third: ThirdPart,
    batch_size: int | None = None,
    *,
    shuffle: bool = False,
    class_weight: ClassWeight | None = None,
    labels: bool = True,
    training: bool = False,
) -> Feed:
    """Makes a feed over arrays, or over a source of batches that is given as the inputs.

    Args:
        model: The model; its number of classes is compared with the labels.
        parts: Inputs, targets and sample weights; targets and weights may be `None`.
        third: What the third part of a batch is.
        batch_size: For arrays.
        shuffle: For arrays and `PyDataset`s; other sources have an order of their own.
        class_weight: Weights of examples, by class; for several outputs by name and class.
        labels: Whether to check the labels.
        training: Whether the model is trained on the feed.

    Raises:
        DataError: The parts do not fit together, a label is outside the classes, or a weight is negative. Also while
            batches are read for training, if the weights of a batch sum to zero.
    """
    x, y, sample_weight = parts
    outputs = getattr(model, "output_names", None) or ()
    if is_arrays(parts):
        if class_weight is not None:
            sample_weight = _weights_by_class(y, sample_weight, class_weight, outputs)
        feed = Feed(packed((x, y, sample_weight)), batch_size=batch_size, shuffle=shuffle, seed=None if shuffle else 0)
        weights = weights_in(y, sample_weight)
    else:
        feed = _source_feed(parts, shuffle, class_weight, outputs)
        weights = weights_in_batch(feed.whole) if third.is_weights else []
    check = label_check(model) if labels else None
    if feed.whole is None or third.is_weights is None:
        feed.check(functools.partial(third.checked, functools.partial(_check_batch, check, training=training)))
        return feed
    if check is not None:
        check(*_inputs_and_labels(feed.whole, third.is_weights))
    check_weights(weights, training=False)
    if training and not all(array.all() for array in weights):  # Only then can the weights of a batch sum to zero.
        feed.check(functools.partial(_check_batch, None, weighed=True, training=True))
    return feed


def _source_feed(parts: Parts, shuffle: bool, class_weight: ClassWeight | None, outputs: Sequence[str]) -> Feed:
    x, y, sample_weight = parts
    if isinstance(x, Feed) and class_weight is not None:
        raise DataError(
            "HL433: class_weight does not apply to an hl.Feed.",
            fix="Make the feed over (x, y, sample_weight), with the weight of each example's class.",
        )
    by_batch = shuffle and isinstance(x, keras.utils.PyDataset)
    feed = x.view() if isinstance(x, Feed) else Feed(x, shuffle=by_batch, seed=None if by_batch else 0)
    if y is not None or sample_weight is not None:
        raise _not_together(x, y, sample_weight)
    if class_weight is not None:
        feed.prepare(functools.partial(_with_class_weight, class_weight, outputs))
    return feed


def packed(parts: Parts) -> Any:
    """The parts in the form that steps take. Keras's own function would drop weights that come without targets."""
    return keras.utils.pack_x_y_sample_weight(*parts) if parts[1] is not None or parts[2] is None else parts


def unpacked(data: Any) -> Parts:
    """The inverse of `packed`.

    Raises:
        DataError: There are more than three parts.
    """
    if isinstance(data, (list, tuple)) and len(data) > len(("x", "y", "sample_weight")):
        raise _list_of_batches(f"The data has {len(data)} parts; it can be x, (x, y) or (x, y, sample_weight).")
    return cast(Parts, keras.utils.unpack_x_y_sample_weight(data))


def unpacked_like(x: Any, validation_data: Any) -> Parts:
    """The parts of validation data.

    Raises:
        DataError: It is a list of batches: the training data has one array for inputs, and this has several.
    """
    parts = unpacked(validation_data)
    if is_arrays(x) and not isinstance(x, (list, tuple)) and isinstance(parts[0], (list, tuple)):
        count = len(validation_data)
        raise _list_of_batches(f"validation_data is a list of {count} parts, each of which has several arrays.")
    return parts


def check_targets(model: keras.Model, y: Any) -> None:
    """Raises an error if the compiled loss has no targets."""
    if y is None and model.loss:
        raise _list_of_batches(f"{type(model).__name__} is compiled with a loss, and the data has no targets.")


def _list_of_batches(saw: str) -> DataError:
    return DataError(
        f"HL446: {saw}",
        "One tuple or list of arrays is several inputs in one: neither (x, y) nor batches.",
        "Pass the targets as y: fit(x, y), evaluate(x, y). Pass a list of batches as a function that returns an "
        "iterator: fit(lambda: iter(batches)), validation_data=lambda: iter(batches).",
    )


def in_order_of_outputs(model: keras.Model, y_pred: Any, sample_weight: Any) -> Any:
    """Sample weights by name in the order of the outputs, if these have one; Keras does the same with targets only."""
    if isinstance(y_pred, (list, tuple)) and isinstance(sample_weight, dict):
        return [sample_weight.get(name) for name in model.output_names]
    return sample_weight


def _weights_by_class(y: Any, sample_weight: Any, class_weight: ClassWeight, outputs: Sequence[str]) -> Any:
    """Sample weights that weigh each example by its class."""
    if sample_weight is not None:
        raise DataError(
            "HL439: Both class_weight and sample_weight were given.",
            fix="Pass one of them. For both, multiply the class weights into sample_weight.",
        )
    return class_weights(y, class_weight, outputs)


def _not_together(x: Any, y: Any, sample_weight: Any) -> DataError:
    if not is_arrays(x):
        return DataError(
            f"HL434: x gives batches by itself (its type is {type(x).__name__}), but y or sample_weight was given too.",
            fix="Put them into the batches: each batch as (x, y) or (x, y, sample_weight).",
        )
    name, part = ("sample_weight", sample_weight) if y is None or is_arrays(y) else ("y", y)
    return DataError(
        f"HL435: x is arrays, so {name} must be arrays too; its type is {type(part).__name__}.",
        fix=f"Convert a list of numbers with np.array({name}).",
    )


def _with_class_weight(class_weight: ClassWeight, outputs: Sequence[str], batch: Any) -> Parts:
    if _inputs_and_labels(batch, weighed=True)[1] is None:
        raise DataError("HL440: class_weight needs labels; a batch has none.", fix="Give batches of the form (x, y).")
    x, y, sample_weight = unpacked(batch)
    return x, y, _weights_by_class(y, sample_weight, class_weight, outputs)


def _check_batch(check: Callable[[Any, Any], None] | None, batch: Any, weighed: bool, *, training: bool) -> None:
    if check is not None:
        check(*_inputs_and_labels(batch, weighed))
    if weighed:
        check_weights(weights_in_batch(batch), training=training)


def _inputs_and_labels(batch: Any, weighed: bool) -> tuple[Any, Any]:
    parts = (2, 3) if weighed else (2,)
    return batch[:2] if isinstance(batch, tuple) and len(batch) in parts else (batch, None)
