"""Runs whose reports are written in advance, and models whose weights tell what callbacks have done."""

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from tests.models import fit
from tests.numbers import numpy

NAN, INF = np.nan, np.inf
X = np.zeros((4, 1), dtype="float32")


class Scripted(hl.Model):
    """Reports given values, one a step, and counts its steps in a weight."""

    def __init__(self, script, optimizer=None, name="loss"):
        super().__init__()
        self.script = keras.Variable(np.array(script, dtype="float32"), trainable=False)
        self.count = self.add_weight(initializer="zeros", trainable=False, name="count")
        self.built, self.reported = True, name
        self.compile(optimizer or keras.optimizers.SGD(0.1))

    def call(self, x):
        return x

    def train_step(self, data):
        value = ops.take(self.script, ops.cast(self.count, "int32"))
        self.count.assign(self.count + 1)
        return {self.reported: value}


class TwoParts(hl.Model):
    """Two parts, each with a weight that falls from zero by the rate of its optimizer in each step."""

    def __init__(self, optimizers):
        super().__init__()
        self.generator, self.critic = (layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in range(2))
        for part in (self.generator, self.critic):
            part.build((None, 1))
        self.built = True
        self.compile(optimizers)

    def call(self, x):
        return self.generator(x) + self.critic(x)

    def train_step(self, x):
        self.minimize(lambda: ops.sum(self.generator.kernel) + ops.sum(self.critic.kernel))
        return {"loss": ops.mean(x)}

    def weights_now(self):
        return [numpy(part.kernel).item() for part in (self.generator, self.critic)]


def multi(by_function=False):
    """Two parts with a `MultiOptimizer` of Keras: the generator's rate is 1, the critic's 2."""
    one, other = keras.optimizers.SGD(1.0, name="one"), keras.optimizers.SGD(2.0, name="other")
    model = TwoParts("sgd")
    generator = model.generator.kernel.path
    owners = keras.optimizers.OptimizerMap(other, {generator: one})
    model.compile(keras.optimizers.MultiOptimizer((lambda variable: owners[variable.path]) if by_function else owners))
    return model


def mean_step(x):
    """A step without a model."""
    return {"mean": ops.mean(x)}


def at(hook, function):
    """A callback that calls a function at one hook."""
    return keras.callbacks.LambdaCallback(**{hook: function})


def raising(error, hook, number):
    """A callback that raises an error at an epoch or a batch."""

    def fail(index, logs):
        if index == number:
            raise error

    return at(hook, fail)


def run(model, *callbacks, epochs=None, **options):
    """A step an epoch, as long as the script lasts; returns the history."""
    return fit(model, X, epochs=epochs or model.script.shape[0], callbacks=callbacks, **options)


def feed(callback, logs, model, first=0, state=None):
    """Calls a callback's hooks as a run of one step an epoch does; returns the logs as it left them."""
    callback.set_params({"epochs": 99, "steps": 1, "verbose": 0})
    callback.set_model(model)
    callback.on_train_begin({})
    if state is not None:
        hl.callbacks.restore_callback(callback, state)
    seen = []
    for epoch, values in enumerate(logs, first):
        left = dict(values)
        callback.on_epoch_begin(epoch, {})
        callback.on_train_batch_begin(0, {})
        callback.on_train_batch_end(0, values)
        callback.on_epoch_end(epoch, left)
        seen.append(left)
        if model.stop_training:
            break
    return seen
