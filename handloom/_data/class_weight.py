"""Class labels: sample weights by class, and the check that all labels are among the classes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import optree

from handloom._data.sources import on_host
from handloom._interop.tensors import kind_of
from handloom._keras import keras
from handloom.errors import DataError

ClassWeight: TypeAlias = Mapping[int, float] | Mapping[str, Mapping[int, float]]
"""Weights by class, or by the name of an output and by class."""


def class_weights(y: Any, class_weight: ClassWeight, outputs: Sequence[str] = ()) -> Any:
    """The sample weights that weigh each example by its class.

    Args:
        y: The labels of one output; or of several, by name, or in the order of `outputs`.
        class_weight: Weights by class; for several outputs by name and class. 1 for classes and outputs not listed.
        outputs: The names of the outputs of the model, as far as it has names for them.

    Returns:
        Weights of shape `(examples,)`; for several outputs in the structure of `y`.

    Raises:
        DataError: The outputs have no labels or other names, or a weight is negative or not finite.
    """
    if not class_weight or not all(isinstance(weights, Mapping) for weights in class_weight.values()):
        return _weights_of_one(y, class_weight)
    names = list(y) if isinstance(y, Mapping) else list(outputs) if isinstance(y, (list, tuple)) else []
    if not names or len(y) != len(names) or not set(class_weight) <= set(names):
        raise DataError(
            f"HL441: class_weight is given for the outputs {list(class_weight)}; y has the labels of "
            f"{names or 'outputs without names'}.",
            fix="Pass y as a dict with the same names; for a single output, class_weight={class: weight}.",
        )

    def weights(path: tuple[Any, ...], labels: Any) -> np.ndarray:
        name = path[0] if isinstance(y, Mapping) else names[path[0]]
        if name in class_weight:
            return _weights_of_one(labels, cast(Any, class_weight)[name])
        return np.ones(len(labels), dtype=keras.config.floatx())

    return optree.tree_map_with_path(weights, y)


def _weights_of_one(y: Any, class_weight: Mapping[Any, Any]) -> np.ndarray:
    """The weight of each example, by its class; 1 for a class that is not listed.

    Args:
        y: Labels: whole numbers of shape `(examples,)` or `(examples, 1)`, or one-hot rows `(examples, classes)`.
        class_weight: Weight by class.

    Returns:
        Weights of shape `(examples,)`, in `keras.config.floatx()`.

    Raises:
        DataError: There are no labels or those of several outputs, or a weight is negative or not finite.
    """
    wrong = {label: weight for label, weight in class_weight.items() if not 0 <= weight < math.inf}
    if wrong:
        raise DataError(f"HL401: class_weight takes finite numbers, 0 or more; received {wrong}.")
    if not _is_one_array(y):
        raise DataError(
            "HL402: class_weight needs labels of one output as y.",
            fix="For several outputs, pass weights for each by its name: class_weight={'output': {0: 1.0, 1: 2.0}}.",
        )
    labels = on_host(y)
    if labels.ndim > 1:
        labels = labels[..., 0] if labels.shape[-1] == 1 else labels.argmax(-1)
    classes, positions = np.unique(np.rint(labels).astype(np.int64), return_inverse=True)
    weights = np.array([class_weight.get(int(label), 1.0) for label in classes], dtype=keras.config.floatx())
    return weights[positions.reshape(labels.shape)]


def label_check(model: keras.Model) -> Callable[[Any, Any], None]:
    """Makes a check of the inputs and labels of one batch after another, for a sparse categorical crossentropy.

    It raises a `DataError` if a label is not among the model's classes. JAX would silently count such an example as
    zero loss; the other backends fail with the name of an operation. The classes are counted once: that is slow.
    """
    counted: list[int | None] = []

    def check(x: Any, y: Any) -> None:
        if not _is_one_array(y) or kind_of(y) != "dense" or not _takes_labels(model.loss):
            return
        if not counted:
            counted.append(_class_count(model, x))
        if (classes := counted[0]) is not None:
            _check_below(classes, on_host(y), model.loss)

    return check


def _is_one_array(y: Any) -> bool:
    return y is not None and not isinstance(y, (dict, list, tuple))


def _takes_labels(loss: Any) -> bool:
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = keras.losses.sparse_categorical_crossentropy
    return loss is function or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)


def _check_below(classes: int, labels: np.ndarray, loss: Any) -> None:
    if labels.dtype.kind not in "iuf":
        return
    ignored = loss.get_config().get("ignore_class") if hasattr(loss, "get_config") else None
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignored)
    if outside.any():
        where = tuple(int(index) for index in np.argwhere(outside)[0])
        raise DataError(
            f"HL403: y has the label {labels[where]} (at {list(where)}, one of {int(outside.sum())} outside the "
            f"classes), but the model has {classes} outputs, for classes 0 to {classes - 1}.",
            fix="Number the classes from 0, or give the last layer as many units as there are classes.",
        )


def _class_count(model: keras.Model, x: Any) -> int | None:
    """The size of the last axis of the model's one output; `None` if it is unknown."""

    def example(array: Any) -> keras.KerasTensor:
        return keras.KerasTensor((None, *array.shape[1:]), keras.backend.standardize_dtype(np.asarray(array[:0]).dtype))

    try:
        output = model.compute_output_spec(keras.tree.map_structure(example, x))
    except Exception:  # A model may be unable to compute it; training then shows why.
        return None
    return int(output.shape[-1]) if isinstance(output, keras.KerasTensor) and output.shape[-1] else None
