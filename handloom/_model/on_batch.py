"""The methods of `hl.Model` that train, evaluate or predict on one batch, without a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handloom._data.class_weight import label_check
from handloom._keras import in_keras_order, keras
from handloom._model.data import Parts, as_one_batch, packed, weights_by_class


def train_on_batch(
    self: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | None = None,
    return_dict: bool = False,
) -> Any:
    """Trains on one batch, given as arrays; returns the reported values, in the form of `evaluate`."""
    if class_weight is not None:
        sample_weight = weights_by_class(y, sample_weight, class_weight)
    return _run(self, "train", (x, y, sample_weight), return_dict)


def test_on_batch(
    self: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False
) -> Any:
    """Evaluates on one batch, given as arrays; returns the reported values, in the form of `evaluate`."""
    return _run(self, "test", (x, y, sample_weight), return_dict)


def predict_on_batch(self: keras.Model, x: Any) -> Any:
    """Returns the outputs of the model for one batch, given as arrays, as NumPy arrays."""
    with self._steps.running():
        outputs = self._steps.prediction(as_one_batch(keras.utils.pack_x_y_sample_weight(x)))
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def _run(model: keras.Model, mode: str, parts: Parts, return_dict: bool) -> Any:
    model._check_compiled(f"{mode}_on_batch", f"{mode}_step")
    label_check(model)(parts[0], parts[1])
    with model._steps.running():
        step = model._steps.reporting(f"{mode}_step")
        step.start_epoch()
        step.take(as_one_batch(packed(parts), training=mode == "train"))
        logs = dict(step.logs)
    return logs if return_dict else in_keras_order(model, logs)
