"""Models as Keras's guides and examples on custom training write them, in short: trained by Keras and by Handloom."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import handloom as hl
from tests.numbers import close, each_close, normal, values_of

X = normal(8, 4)
LABELS = np.arange(8, dtype="int32") % 3


def mlp(inputs: int, outputs: int, hidden: int = 5, name: str | None = None, **options: Any) -> keras.Model:
    """A small functional network."""
    tensor = start = keras.Input((inputs,))
    tensor = layers.Dense(hidden, activation="tanh")(tensor)
    return keras.Model(start, layers.Dense(outputs, **options)(tensor), name=name)


def updated(model: Any, loss: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
    """Updates the metrics of a model as Keras's guides do at the end of a step; returns their results."""
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss)
        else:
            metric.update_state(y, y_pred, sample_weight=sample_weight)
    return {metric.name: metric.result() for metric in model.metrics}


def evaluation_step(model: Any, data: Any) -> dict[str, Any]:
    """The `test_step` of Keras's guides."""
    x, y = data
    y_pred = model(x, training=False)
    return updated(model, model.compute_loss(y=y, y_pred=y_pred), y, y_pred)


Make = Callable[[type], tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""Takes the class to derive a model from; returns the compiled model, its data, and options of `fit`."""


def trained(make: Make, base: type) -> tuple[Any, dict[str, list[float]], Any]:
    """A model after three epochs of one batch (a mean over the epoch is the batch's value); its history; its data."""
    keras.utils.set_random_seed(3)
    model, data, options = make(base)
    history = model.fit(*data, **({"epochs": 3, "verbose": 0, "shuffle": False} | options)).history
    return model, history, data


def trains_as_keras(make: Make, rtol: float = 1e-4) -> None:
    """Fails unless Handloom reports, trains, evaluates and predicts the same numbers as Keras."""
    (plain, expected, data), (own, history, _) = (trained(make, base) for base in (keras.Model, hl.Model))
    assert set(history) == set(expected), (history, expected)
    for name, values in expected.items():
        close(history[name], values, rtol, 1e-5)
    each_close(values_of(own), values_of(plain), rtol, 1e-5)
    each_close(further(own), further(plain), rtol, 1e-5)
    if defines(plain, "test_step"):
        results, expected = (model.evaluate(*data, verbose=0, return_dict=True) for model in (own, plain))
        assert set(results) == set(expected)
        each_close(results.values(), [expected[name] for name in results], rtol, 1e-5)
    if isinstance(data[0], np.ndarray) and (defines(plain, "predict_step") or defines(plain, "call")):
        each_close(*(keras.tree.flatten(model.predict(data[0], verbose=0)) for model in (own, plain)), rtol, 1e-5)


def defines(model: Any, method: str) -> bool:
    """Whether the class of a model has a method of its own."""
    return method in vars(type(model))


def further(model: Any) -> list[Any]:
    """What a model keeps apart from Keras variables, and the slots of its own optimizers.

    The compiled optimizer is left out: Keras builds it for all variables, even if no step uses it.
    """
    own = {name: value for name, value in vars(model).items() if name not in ("optimizer", "_optimizer")}
    return [
        *getattr(model, "kept", ()),
        *values_of(*(value for value in own.values() if isinstance(value, keras.optimizers.Optimizer))),
    ]
