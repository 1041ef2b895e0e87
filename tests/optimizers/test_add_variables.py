"""`add_variables`, and models that call it because a layer was unfrozen or added between two runs."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom._keras import trained_by
from handloom.errors import OptimizerError
from handloom.optimizers import (
    GradientAccumulation,
    GradientTransforms,
    LossScaleOptimizer,
    WeightAveraging,
    add_variables,
)
from tests.models import compiled, fit, sequential
from tests.numbers import close, normal, numpy, same, same_values

SGD = keras.optimizers.SGD
X, Y = normal(8, 3), normal(8, 1, seed=1)
RATE, MOMENTUM = 0.1, 0.9

each_optimizer = pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(0.01),
        lambda: GradientAccumulation({"*": "adam"}, 2),
        lambda: WeightAveraging(SGD(0.01, momentum=MOMENTUM)),
        lambda: LossScaleOptimizer(GradientAccumulation(SGD(0.01, use_ema=True), 2)),
        lambda: GradientTransforms({"*": "sgd"}, []),
    ],
    ids=["Adam", "accumulated by name", "averaged", "scaled", "transformed by name"],
)


def stack(optimizer):
    return compiled(sequential(layers.Dense(4), layers.Dense(1)), optimizer)


def train(model, epochs=1):
    fit(model, X, Y, batch_size=4, epochs=epochs)


def slots(optimizer):
    return {variable.path: numpy(variable).copy() for variable in optimizer.variables}


def changed(before, model):
    return [bool((old != new).any()) for old, new in zip(before, model.get_weights(), strict=True)]


@each_optimizer
def test_model_adds_slots_in_order_for_an_unfrozen_part_and_keeps_the_others(make, tmp_path):
    model, whole = stack(make()), stack(make())
    model.layers[0].trainable = False
    train(model)
    before, weights = slots(model.optimizer), model.get_weights()
    model.layers[0].trainable = True
    with model._steps.running():  # As a run does before its first step.
        after = slots(model.optimizer)
    assert before.keys() <= after.keys()
    for path, value in after.items():
        same(value, before.get(path, np.zeros_like(value)))
    train(model)
    assert all(changed(weights, model))
    train(whole)
    assert [v.shape for v in model.optimizer.variables] == [v.shape for v in whole.optimizer.variables]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")  # Warns if the optimizer does not fit.
    same_values(loaded.optimizer, model.optimizer)


def test_fit_leaves_each_optimizer_of_a_multi_optimizer_its_own_variables_also_unfrozen_ones():
    kernels, biases = SGD(0.1, momentum=MOMENTUM), SGD(0.0)
    own = keras.optimizers.OptimizerMap(default_optimizer=kernels, optimizer_map={".*/bias": biases})
    model = stack(keras.optimizers.MultiOptimizer(own))
    model.layers[0].trainable = False
    train(model)
    model.layers[0].trainable = True
    before = model.get_weights()
    train(model)
    assert changed(before, model) == [True, False, True, False]
    assert [len(trained_by(optimizer)) for optimizer in (kernels, biases)] == [2, 2]


@each_optimizer
def test_model_trains_a_layer_that_was_added(make):
    model = stack(make())
    train(model)
    model.add(layers.Dense(1))
    before = model.get_weights()
    train(model, epochs=2)
    assert all(changed(before, model))


def test_add_variables_for_a_part_keeps_the_variables_of_the_optimizer():
    a, b = keras.Variable(1.0, name="a"), keras.Variable(2.0, name="b")
    optimizer = SGD(RATE, momentum=MOMENTUM)
    for variables in ([a], [b]):
        add_variables(optimizer, variables)
        hl.minimize(lambda: a**2 + b**2, variables, optimizer)
    assert trained_by(optimizer) == [b, a]
    found = slots(optimizer)
    close([found["sgd/a_momentum"], found["sgd/b_momentum"]], [-2 * RATE, -4 * RATE])


def test_add_variables_cannot_distinguish_variables_of_the_same_path():
    one, two = (keras.Variable(1.0, name="same") for _ in range(2))
    optimizer = SGD(RATE)
    optimizer.build([one])
    with pytest.raises(OptimizerError, match=r"several have the path 'same'.*different names.*HL302"):
        add_variables(optimizer, [one, two])
