"""Data as `keras.Model.fit` takes it: `x`, `y` and weights apart, or a source of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from handloom._data.class_weight import check_labels, class_weights, label_check
from handloom._data.feed import Feed
from handloom._data.sample_weight import check_weights, weights_in, weights_in_batch
from handloom._data.sources import Batch, is_arrays
from handloom._keras import keras
from handloom.errors import DataError

ops = keras.ops

Parts = tuple[Any, Any, Any]
"""Inputs, targets, sample weights."""


def model_feed(
    model: keras.Model,
    parts: Parts,
    batch_size: int | None = None,
    *,
    shuffle: bool = False,
    class_weight: Mapping[int, float] | None = None,
    labels: bool = True,
    training: bool = False,
) -> Feed:
    """A feed over arrays, or over a source of batches given as the inputs.

    Args:
        model: Whose classes the labels are checked against.
        parts: Inputs, targets and sample weights; of the last two either may be `None`.
        batch_size: For arrays.
        shuffle: For arrays and `PyDataset`s; other sources decide for themselves.
        class_weight: Weights of examples by their class.
        labels: Whether there are labels to check.
        training: Whether it is to be trained on.

    Raises:
        DataError: If the parts do not go together, a label is outside the classes, or a weight is negative; when a
            batch is read to train on, if its weights sum to zero.
    """
    x, y, sample_weight = parts
    if is_arrays(parts):
        if class_weight is not None:
            sample_weight = weights_of(y, sample_weight, class_weight)
        feed = Feed(packed((x, y, sample_weight)), batch_size=batch_size, shuffle=shuffle, seed=None if shuffle else 0)
        if labels:
            check_labels(model, x, y)
        _check_all(feed, weights_in(y, sample_weight), training=training)
        return feed
    if isinstance(x, Feed) and class_weight is not None:
        raise DataError("HL433: class_weight is not applied to an hl.Feed; have its data be (x, y, sample_weight).")
    by_batch = shuffle and isinstance(x, keras.utils.PyDataset)
    feed = x.view() if isinstance(x, Feed) else Feed(x, shuffle=by_batch, seed=None if by_batch else 0)
    if y is not None or sample_weight is not None:
        raise _not_together(x, y, sample_weight)
    if class_weight is not None:
        feed.prepare(functools.partial(_weighted, class_weight))
    check = label_check(model) if labels else None
    if feed.whole is None:
        feed.check(functools.partial(_check_batch, check, training=training))
    else:
        _check_labels(check, feed.whole)
        _check_all(feed, weights_in_batch(feed.whole), training=training)
    return feed


def _check_all(feed: Feed, weights: Sequence[np.ndarray], *, training: bool) -> None:
    """Checks the weights of arrays at once; in training those of a batch too, if there are zeros among them."""
    check_weights(weights, training=False)
    if training and not all(array.all() for array in weights):
        feed.check(functools.partial(_check_batch, None, training=True))


def _not_together(x: Any, y: Any, sample_weight: Any) -> DataError:
    if not is_arrays(x):
        return DataError(
            f"HL434: x gives batches by itself (it is of type {type(x).__name__}), so y and sample_weight must come in them: "
            "each batch as (x, y) or (x, y, sample_weight).",
        )
    name, part = ("sample_weight", sample_weight) if y is None or is_arrays(y) else ("y", y)
    return DataError(
        f"HL435: x is arrays, so {name} must be too; it is of type {type(part).__name__}. Lists of numbers become arrays by "
        "np.array(...).",
    )


def packed(parts: Parts) -> Any:
    """The parts as steps take them. Keras's own function would drop weights that come without targets."""
    x, y, sample_weight = parts
    if y is None and sample_weight is not None:
        return x, y, sample_weight
    return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)


def unpacked(data: Any) -> Parts:
    return cast(Parts, keras.utils.unpack_x_y_sample_weight(data))


def split(parts: Parts, fraction: float) -> tuple[Parts, Parts]:
    """The arrays without their last part, and that part."""
    if not is_arrays(parts):
        raise DataError(
            "HL436: validation_split is for arrays; of other data, pass what to validate on as validation_data."
        )
    if not 0 < fraction < 1:
        raise DataError(f"HL437: validation_split is a fraction between 0 and 1; received {fraction!r}.")
    count = len(keras.tree.flatten([part for part in parts if part is not None])[0])
    first = int(count * (1 - fraction))
    if first in (0, count):
        raise DataError(f"HL438: validation_split={fraction} leaves no examples on one side of {count}.")

    def part(chosen: slice) -> Parts:
        def cut(array: Any) -> Any:
            return None if array is None else getattr(array, "iloc", array)[chosen]

        return cast(Parts, keras.tree.map_structure(cut, parts))

    return part(slice(None, first)), part(slice(first, None))


def weights_of(y: Any, sample_weight: Any, class_weight: Mapping[int, float]) -> Any:
    if sample_weight is not None:
        raise DataError("HL439: Pass class_weight or sample_weight, not both; multiply them into one sample_weight.")
    return class_weights(y, class_weight)


def _weighted(class_weight: Mapping[int, float], batch: Any) -> Any:
    """A batch of a source, its class weights added."""
    if not _has_labels(batch):
        raise DataError("HL440: class_weight needs labels: batches of the form (x, y).")
    x, y, sample_weight = unpacked(batch)
    return x, y, weights_of(y, sample_weight, class_weight)


def _check_batch(labels: Callable[[Any, Any], None] | None, batch: Any, *, training: bool) -> None:
    _check_labels(labels, batch)
    check_weights(weights_in_batch(batch), training=training)


def _check_labels(labels: Callable[[Any, Any], None] | None, batch: Any) -> None:
    if labels is not None and _has_labels(batch):
        labels(batch[0], batch[1])


def _has_labels(batch: Any) -> bool:
    return isinstance(batch, tuple) and 2 <= len(batch) <= 3


def as_one_batch(data: Any, *, training: bool = False) -> Batch:
    """Arrays as one batch of tensors."""
    feed = Feed(iter([data]))
    feed.check(functools.partial(_check_batch, None, training=training))
    [batch] = feed
    return batch
