"""`compute_loss` of a model's own, in the default steps."""

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from tests.models import fit, functional
from tests.numbers import close, normal, ones

X = normal(6, 3)
Y = ones(6, 1)


class Apart(hl.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        del x, sample_weight
        return 3.0 * ops.mean(ops.abs(y - y_pred))


class Extended(hl.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training) + 100.0


def model(cls):
    made = functional(layers.Dense(1, kernel_initializer="ones"), cls=cls)
    made.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    return made


ERROR = np.abs(X.sum(1, keepdims=True) - Y)


def test_fit_and_evaluate_report_the_loss_of_a_compute_loss_that_replaces_the_compiled_loss(eagerly):
    history = fit(model(Apart), X, Y, batch_size=4, validation_data=(X, Y))
    close([history["loss"], history["val_loss"]], 2 * [[3 * ERROR.mean()]])
    close(model(Apart).evaluate(X, Y, batch_size=4, verbose=0), [3 * ERROR.mean(), ERROR.mean()])


def test_fit_and_evaluate_report_the_loss_of_a_compute_loss_that_adds_to_the_compiled_loss(eagerly):
    history = fit(model(Extended), X, Y, batch_size=4, validation_data=(X, Y))
    close([history["loss"], history["val_loss"]], 2 * [[100 + np.square(ERROR).mean()]])
    close(model(Extended).test_on_batch(X, Y), [100 + np.square(ERROR).mean(), ERROR.mean()])
