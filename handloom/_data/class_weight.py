"""Class labels: weights by class, and the check that there is no label outside the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from handloom._data.sources import on_host
from handloom._interop.tensors import kind_of
from handloom._keras import keras
from handloom.errors import DataError


def class_weights(y: Any, class_weight: Mapping[int, float]) -> np.ndarray:
    """The weight of each example, by its class; 1 for a class that is not listed.

    Args:
        y: Labels: whole numbers of shape `(examples,)` or `(examples, 1)`, or one-hot rows `(examples, classes)`.
        class_weight: Weight by class.

    Returns:
        Weights of shape `(examples,)`, in `keras.config.floatx()`.

    Raises:
        DataError: If there are no labels, or those of several outputs, or a weight is negative or not finite.
    """
    wrong = {label: weight for label, weight in class_weight.items() if not 0 <= weight < math.inf}
    if wrong:
        raise DataError(f"HL401: class_weight takes finite numbers, 0 or more; received {wrong}.")
    if y is None or isinstance(y, (dict, list, tuple)):
        raise DataError(
            "HL402: class_weight needs the labels of one output as y; for several outputs, pass sample_weight."
        )
    labels = on_host(y)
    if labels.ndim > 1:
        labels = labels[..., 0] if labels.shape[-1] == 1 else labels.argmax(-1)
    classes, positions = np.unique(np.rint(labels).astype(np.int64), return_inverse=True)
    weights = np.array([class_weight.get(int(label), 1.0) for label in classes], dtype=keras.config.floatx())
    return weights[positions.reshape(labels.shape)]


def check_labels(model: keras.Model, x: Any, y: Any) -> None:
    """Checks that labels for a sparse categorical crossentropy are among the model's classes.

    JAX would count such an example as zero loss in silence, and the others fail with the name of an operation.

    Raises:
        DataError: If one is not.
    """
    label_check(model)(x, y)


def label_check(model: keras.Model) -> Callable[[Any, Any], None]:
    """`check_labels` for one batch after the other: what takes long, counting the model's classes, is done once."""
    count: list[int | None] = []

    def check(x: Any, y: Any) -> None:
        if y is None or isinstance(y, (dict, list, tuple)) or kind_of(y) != "dense":
            return
        if not _takes_labels(model.loss):
            return
        if not count:
            count.append(_class_count(model, x))
        if count[0] is not None:
            _check_below(count[0], on_host(y), model.loss)

    return check


def _takes_labels(loss: Any) -> bool:
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = keras.losses.sparse_categorical_crossentropy
    return loss is function or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)


def _check_below(classes: int, labels: np.ndarray, loss: Any) -> None:
    if labels.dtype.kind not in "iuf":
        return
    outside = (labels < 0) | (labels >= classes)
    if outside.any() and hasattr(loss, "get_config"):
        ignored = loss.get_config().get("ignore_class")
        outside &= labels != ignored if ignored is not None else True
    if outside.any():
        where = tuple(int(index) for index in np.argwhere(outside)[0])
        raise DataError(
            f"HL403: y has the label {labels[where]} (at {list(where)}, one of {int(outside.sum())} such), but the "
            f"model has {classes} outputs, for classes 0 to {classes - 1}. Number the classes from 0, or give the last "
            "layer as many units as there are classes.",
        )


def _class_count(model: keras.Model, x: Any) -> int | None:
    """The size of the last axis of the model's one output."""

    def example(array: Any) -> keras.KerasTensor:
        return keras.KerasTensor((None, *array.shape[1:]), keras.backend.standardize_dtype(np.asarray(array[:0]).dtype))

    try:
        output = model.compute_output_spec(keras.tree.map_structure(example, x))
    except Exception:  # A model that cannot say; then the loss will.
        return None
    return int(output.shape[-1]) if isinstance(output, keras.KerasTensor) and output.shape[-1] else None
