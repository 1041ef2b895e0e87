"""The module of a user: custom components of every kind, by the conventions of Keras alone.

The first half has Keras's decorator, and loads wherever this module is imported. The second half lacks it.
"""

import keras
from keras import layers, ops

import handloom as hl

registered = keras.saving.register_keras_serializable("users")


@registered
class Pinball(keras.Loss):
    def __init__(self, quantile, **options):
        super().__init__(**options)
        self.quantile = quantile

    def call(self, y, y_pred):
        error = y - y_pred
        return ops.mean(ops.maximum(self.quantile * error, (self.quantile - 1) * error), axis=-1)

    def get_config(self):
        return super().get_config() | {"quantile": self.quantile}


@registered
class ShareWithin(keras.Metric):
    def __init__(self, width, name="share_within", **options):
        super().__init__(name=name, **options)
        self.width = width
        self.within, self.seen = (self.add_variable((), "zeros", name=name) for name in ("within", "seen"))

    def update_state(self, y, y_pred, sample_weight=None):
        near = ops.cast(ops.abs(y - y_pred) < self.width, "float32")
        self.within.assign_add(ops.sum(near))
        self.seen.assign_add(ops.sum(ops.ones_like(near)))

    def result(self):
        return self.within / self.seen

    def get_config(self):
        return super().get_config() | {"width": self.width}


@registered
class Scaled(keras.Layer):
    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return self.factor * self.scale * x

    def get_config(self):
        return super().get_config() | {"factor": self.factor}


@registered
class Fourth(keras.Regularizer):
    """The fourth power of weights."""

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, weights):
        return self.strength * ops.sum(weights**4)

    def get_config(self):
        return {"strength": self.strength}


@registered
class SignDescent(keras.Optimizer):
    def __init__(self, learning_rate=0.01, dead_zone=0.0, name="sign_descent", **options):
        super().__init__(learning_rate=learning_rate, name=name, **options)
        self.dead_zone = dead_zone

    def update_step(self, gradient, variable, learning_rate):
        moves = ops.cast(ops.abs(gradient) > self.dead_zone, variable.dtype)
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * moves * ops.sign(gradient))

    def get_config(self):
        return super().get_config() | {"dead_zone": self.dead_zone}


@registered
class Shrink:
    """A transform of gradients with a parameter."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, gradients, variables):
        return [None if gradient is None else self.factor * gradient for gradient in gradients]

    def get_config(self):
        return {"factor": self.factor}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@registered
def turn_around(gradients, variables):
    """A transform without parameters."""
    return [None if gradient is None else -gradient for gradient in gradients]


@registered
class Net(hl.Model):
    """A whole model, with a custom step."""

    def __init__(self, units, penalty, **options):
        super().__init__(**options)
        self.units, self.penalty = units, penalty
        self.body = keras.Sequential([layers.Dense(units, "tanh", kernel_regularizer=Fourth(penalty)), Scaled(0.5)])
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.body(x))

    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean(ops.abs(self(x) - y)))}

    def get_config(self):
        return super().get_config() | {"units": self.units, "penalty": self.penalty}


@registered
class Twice(hl.Model):
    """A custom step for functional models of any inputs and outputs."""

    def predict_step(self, data):
        return 2 * super().predict_step(data)


# ------------------------------------------------------------- without the decorator


def plain(cls):
    """A subclass."""
    return type(f"Plain{cls.__name__}", (cls,), {})


def plain_error(y, y_pred):
    return ops.mean(ops.abs(y - y_pred), axis=-1)


def plain_turn_around(gradients, variables):
    return [None if gradient is None else -gradient for gradient in gradients]
