"""What Keras's guides write alike on every backend: layers that add losses and metrics, and draw random numbers."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.guides.common import LABELS, X, trains_as_keras

TARGETS = X[:, :1]


class Endpoint(layers.Layer):
    """Computes the loss and a metric from targets that are inputs of the model."""

    def __init__(self, name=None):
        super().__init__(name=name)
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
        self.accuracy_fn = keras.metrics.BinaryAccuracy(name="accuracy")

    def call(self, logits, targets=None, sample_weight=None):
        if targets is not None:
            self.add_loss(self.loss_fn(targets, logits, sample_weight))
            self.accuracy_fn.update_state(targets, logits, sample_weight)
        return ops.sigmoid(logits)


def endpoint(base):
    names = ("inputs", "targets", "weight")
    inputs = {name: keras.Input((4 if name == "inputs" else 1,), name=name) for name in names}
    outputs = Endpoint()(layers.Dense(1)(inputs["inputs"]), inputs["targets"], inputs["weight"])
    model = base(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.01))
    values = (X, (TARGETS > 0).astype("float32"), np.linspace(0.5, 2, 8, dtype="float32")[:, None])
    return model, (dict(zip(names, values, strict=True)),), {}


def endpoint_in_call(base):
    class Regression(base):
        def __init__(self):
            super().__init__()
            self.dense, self.endpoint = layers.Dense(1), Endpoint()

        def call(self, inputs):
            return self.endpoint(self.dense(inputs["inputs"]), targets=inputs["targets"])

    model, data = Regression(), {"inputs": X, "targets": (TARGETS > 0).astype("float32")}
    model(data)
    model.compile(keras.optimizers.Adam(0.01))
    return model, (data,), {}


class Regularizes(layers.Layer):
    def call(self, inputs):
        self.add_loss(0.1 * ops.mean(inputs**2))
        return inputs


def added_loss_alone(base):
    start = keras.Input((4,))
    model = base(start, Regularizes()(layers.Dense(3)(start)))
    model.compile("adam")
    return model, (X, X[:, :3]), {}


def added_loss_and_compiled_loss(base):
    model, data, options = added_loss_alone(base)
    model.compile("adam", "mse", metrics=["mae"])
    return model, data, options


class RandomScale(layers.Layer):
    """Draws from a generator of its own, in training alone, and counts its calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(5)
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls")

    def call(self, inputs, training=False):
        self.calls.assign(self.calls + 1)
        return inputs * (1 + keras.random.uniform(ops.shape(inputs), seed=self.seed)) if training else inputs


def random_layers(base):
    start = keras.Input((4,))
    inner = layers.GaussianNoise(0.1, seed=1)(layers.Dropout(0.2, seed=1)(RandomScale()(start)))
    model = base(start, layers.Dense(3)(inner))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model, (X, LABELS), {"validation_data": (X, LABELS)}


# Keras itself cannot update a metric in a `call` on JAX.
not_on_jax = pytest.mark.backend("tensorflow", "torch")


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, marks=not_on_jax) for make in (endpoint, endpoint_in_call)),
        added_loss_alone,
        added_loss_and_compiled_loss,
        random_layers,
    ],
    ids=lambda make: make.__name__,
)
def test_model_of_layers_with_losses_metrics_and_random_numbers_trains_as_in_keras(make):
    trains_as_keras(make)
