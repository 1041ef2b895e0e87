"""One batch at a time: methods of `hl.Model` that train, evaluate or predict without a loop around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handloom._data.class_weight import check_labels
from handloom._keras import in_keras_order, keras
from handloom._model.data import Parts, as_one_batch, packed, weights_of
from handloom._model.steps import steps_of


def train_on_batch(
    self: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | None = None,
    return_dict: bool = False,
) -> Any:
    """Trains on one batch, given as arrays; returns what is reported of it, as `evaluate` does."""
    steps_of(self).check_compiled("train_on_batch", "train_step")
    if class_weight is not None:
        sample_weight = weights_of(y, sample_weight, class_weight)
    return _reported(self, "train_step", (x, y, sample_weight), return_dict)


def test_on_batch(
    self: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False
) -> Any:
    """Evaluates on one batch, given as arrays; returns what is reported of it, as `evaluate` does."""
    steps_of(self).check_compiled("test_on_batch", "test_step")
    return _reported(self, "test_step", (x, y, sample_weight), return_dict)


def predict_on_batch(self: keras.Model, x: Any) -> Any:
    """The model's outputs for one batch, given as arrays, as NumPy arrays."""
    steps = steps_of(self)
    with steps.running():
        outputs = steps.prediction(as_one_batch(keras.utils.pack_x_y_sample_weight(x)))
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def _reported(model: keras.Model, name: str, parts: Parts, return_dict: bool) -> Any:
    check_labels(model, parts[0], parts[1])
    steps = steps_of(model)
    with steps.running():
        step = steps.reporting(name)
        step.start_epoch()
        step.take(as_one_batch(packed(parts), training=name == "train_step"))
        logs = dict(step.logs)
    return logs if return_dict else in_keras_order(model, logs)
