"""Runs whose reports are written in advance, so that tests know what callbacks must make of them."""

import keras
import numpy as np
from keras import ops

import handloom as hl

X = np.zeros((4, 1), dtype="float32")


class Scripted(hl.Model):
    """Reports given values, one a step, and counts its steps in a weight."""

    def __init__(self, script, optimizer=None):
        super().__init__()
        self.script = keras.Variable(np.array(script, dtype="float32"), trainable=False)
        self.count = self.add_weight(initializer="zeros", trainable=False, name="count")
        self.built = True
        self.compile(optimizer or keras.optimizers.SGD(0.1))

    def call(self, x):
        return x

    def train_step(self, data):
        value = ops.take(self.script, ops.cast(self.count, "int32"))
        self.count.assign(self.count + 1)
        return {"loss": value}


def number(variable):
    """A variable's value. Not `float(variable)`, of which torch warns."""
    return float(ops.convert_to_numpy(variable))


def run(model, *callbacks, epochs=None, **options):
    """A step an epoch, as long as the script goes on."""
    epochs = epochs or model.script.shape[0]
    return model.fit(X, epochs=epochs, callbacks=callbacks, verbose=0, **options).history


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
