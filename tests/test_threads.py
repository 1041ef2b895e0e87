"""Ten threads that train, evaluate and differentiate at overlapping times: each gets the numbers that it gets alone."""

import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.optimizers import GradientAccumulation
from tests.models import compiled, functional, subclassed
from tests.numbers import normal, numpy, values_of
from tests.threads import in_threads

X, Y = normal(40, 3), normal(40, 1, seed=1)


class AddsLoss(layers.Layer):
    """A layer whose added loss and whose weights' penalty a loss function may forget."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.1), kernel_initializer=start(1))

    def call(self, x):
        self.add_loss(0.01 * ops.mean(x**2))
        return self.dense(x)


def start(seed):
    return keras.initializers.GlorotUniform(seed=seed)


def parts():
    return AddsLoss(), layers.BatchNormalization(), layers.Dropout(0.25, seed=3), head()


def head():
    return layers.Dense(1, kernel_initializer=start(2))


def by_fit(make):
    model = compiled(make(*parts()), keras.optimizers.Adam(0.01), metrics=["mae"])
    history = model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, validation_data=(X, Y), verbose=0).history
    return [history, *values_of(model)]


def by_accumulation():
    model = compiled(functional(*parts()), GradientAccumulation(keras.optimizers.SGD(0.1), 2))
    history = model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    return [history, *values_of(model)]


def by_step():
    model, optimizer = functional(AddsLoss(), head()), keras.optimizers.SGD(0.1, momentum=0.9)
    error = keras.metrics.MeanAbsoluteError(name="error")

    def step(x, y):
        error.update_state(y, model(x))
        loss = hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)
        return {"loss": loss, "error": error.result()}

    history = hl.fit(step, hl.Feed((X, Y), batch_size=8), epochs=2, verbose=0).history
    return [history, *values_of(model)]


def by_evaluation():
    model = compiled(functional(*parts()), metrics=["mae"])
    results = model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    return [results, model.predict(X, batch_size=8, verbose=0)]


def by_gradients():
    model = functional(AddsLoss(), head())

    def loss():
        return ops.mean(ops.square(ops.subtract(model(X), Y))) + sum(model.losses)

    compute = hl.function(hl.value_and_grad(loss, wrt=model))
    value, gradients = compute()
    row = hl.jacobian(lambda x: ops.tanh(x) * ops.sum(x))(X[0])
    return [numpy(value), *map(numpy, gradients), numpy(row)]


def eagerly(work):
    def run():
        with hl.run_eagerly(True):
            return work()

    return run


def by_subclass():
    return by_fit(subclassed)


def by_function():
    return by_fit(functional)


WORKS = [by_function, by_subclass, by_accumulation, by_step, by_evaluation, by_gradients]
WORKS += [eagerly(work) for work in (by_function, by_step, by_evaluation, by_gradients)]


def attributes():
    """Every attribute of the classes and modules of Keras, by identity."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "keras"]
    owners = {id(owner): owner for module in modules for owner in [module, *vars(module).values()]}
    kept = [owner for owner in owners.values() if isinstance(owner, type) or owner in modules]
    return {(owner.__name__, name): id(value) for owner in kept for name, value in list(vars(owner).items())}


# Each work compiles steps of its own, three times: alone, and in two rounds of threads.
@pytest.mark.filterwarnings("ignore::handloom.errors.FallbackWarning")
def test_fit_evaluate_minimize_and_value_and_grad_in_ten_threads_give_the_numbers_that_they_give_alone():
    alone = [work() for work in WORKS]
    before = attributes()
    for _ in range(2):
        together = in_threads(WORKS)
        for work, one, other in zip(WORKS, alone, together, strict=True):
            np.testing.assert_equal(other, one, err_msg=work.__qualname__)
    after = attributes()
    assert {name: value for name, value in before.items() if after[name] != value} == {}
