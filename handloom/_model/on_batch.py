"""The methods of `hl.Model` that train, evaluate or predict on one batch, without a loop."""

from typing import Any

import optree

from handloom._data.class_weight import ClassWeight
from handloom._data.sample_weight import ThirdPart
from handloom._keras import in_keras_order, keras
from handloom._model.data import Parts, model_feed, packed
from handloom._model.steps import check_compiled
from handloom._reporting.nested import outer_epochs_kept
from handloom.backends import backend


def train_on_batch(
    self: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: ClassWeight | None = None,
    return_dict: bool = False,
) -> Any:
    """Trains on one batch, given as arrays; returns the reported values, in the form of `evaluate`."""
    return _run(self, "train", (x, y, sample_weight), return_dict, class_weight=class_weight, training=True)


def test_on_batch(
    self: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False
) -> Any:
    """Evaluates on one batch, given as arrays; returns the reported values, in the form of `evaluate`."""
    return _run(self, "test", (x, y, sample_weight), return_dict)


def predict_on_batch(self: keras.Model, x: Any) -> Any:
    """Returns the outputs of the model for one batch, given as arrays, as NumPy arrays."""
    with self._steps.running():
        outputs = self._steps.prediction(_batch(self, (x, None, None), ThirdPart(False), labels=False))
    return optree.tree_map(backend.result, outputs)


def _run(model: keras.Model, mode: str, parts: Parts, return_dict: bool, **options: Any) -> Any:
    check_compiled(model, f"{mode}_on_batch", f"{mode}_step")
    name = f"{mode}_step"
    third = model._steps.third_part(name, parts[2], options.get("class_weight"))
    batch = _batch(model, parts, third, **options)
    with model._steps.running(), outer_epochs_kept(step := model._steps.reporting(name, third)):
        step.start_epoch()
        step.take(batch)
        logs = step.results()
    return logs if return_dict else in_keras_order(model, logs)


def _batch(model: keras.Model, parts: Parts, third: ThirdPart, **options: Any) -> Any:
    """The parts as one batch of tensors, checked as `model_feed` checks the batches of a source."""
    [batch] = model_feed(model, (iter([packed(parts)]), None, None), third, **options)
    return batch
