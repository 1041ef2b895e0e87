"""Models that many tests train: layers one after the other, in each of the ways in which Keras makes a model."""

import inspect
from typing import Any

import keras
from keras import layers

import handloom as hl


def functional(*parts: keras.Layer, inputs: int = 3, cls: type = hl.Model, **options: Any) -> Any:
    """A functional model of these layers, on examples of so many numbers."""
    tensor = start = keras.Input((inputs,))
    for part in parts or (layers.Dense(1),):
        tensor = part(tensor)
    return cls(start, tensor, **options)


def sequential(*parts: keras.Layer, inputs: int = 3, cls: type = hl.Sequential, **options: Any) -> Any:
    """The same layers as a sequential model."""
    return cls([keras.Input((inputs,)), *(parts or (layers.Dense(1),))], **options)


def subclassed(*parts: keras.Layer, inputs: int | None = 3, cls: type = hl.Model, **options: Any) -> Any:
    """The same layers as a model with a `call` of its own; not built where `inputs` is `None`."""

    class Subclassed(cls):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(**options)
            self.parts = list(parts or (layers.Dense(1),))

        def call(self, x: Any, training: bool = False) -> Any:
            for part in self.parts:
                x = part(x, training=training) if _takes_training(part) else part(x)
            return x

    model = Subclassed()
    if inputs is not None:
        model(keras.ops.ones((2, inputs)))
    return model


KINDS = {"functional": functional, "sequential": sequential, "subclassed": subclassed}


def compiled(model: Any, optimizer: Any = None, loss: Any = "mse", **options: Any) -> Any:
    """The model, compiled; by default with plain SGD at 0.1."""
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, **options)
    return model


def fit(model: Any, *data: Any, **options: Any) -> dict[str, list[Any]]:
    """Trains in the order of the data, in silence; what was reported."""
    return dict(model.fit(*data, **({"shuffle": False, "verbose": 0} | options)).history)


def built(layer: keras.Layer, inputs: int = 3) -> keras.Layer:
    """The layer, built for examples of so many numbers."""
    layer.build((None, inputs))
    return layer


def _takes_training(layer: keras.Layer) -> bool:
    return "training" in inspect.signature(layer.call).parameters
