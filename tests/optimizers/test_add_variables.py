"""Optimizers of models whose parts are thawed, or come, between two runs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._keras import forget_slots, slots_of, trained_by
from handloom.errors import OptimizerError
from handloom.optimizers import (
    GradientAccumulation,
    GradientTransforms,
    LossScaleOptimizer,
    WeightAveraging,
    add_variables,
)

numbers = np.random.default_rng(0)
X = numbers.normal(size=(8, 3)).astype("float32")
Y = numbers.normal(size=(8, 1)).astype("float32")
STARTS = numbers.normal(size=(2, 3, 1)).astype("float32")
RATE, MOMENTUM = 0.1, 0.9

optimizers = pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(0.01),
        lambda: {"*": keras.optimizers.Adam(0.01)},
        lambda: GradientAccumulation({"*": "adam"}, 2),
        lambda: WeightAveraging(keras.optimizers.SGD(0.01, momentum=0.9)),
        lambda: LossScaleOptimizer(GradientAccumulation(keras.optimizers.SGD(0.01, use_ema=True), 2)),
        lambda: GradientTransforms({"*": "sgd"}, []),
    ],
    ids=["Adam", "by name", "accumulated by name", "averaged", "scaled", "transformed by name"],
)


def two_parts():
    """Two linear parts whose outputs are summed."""
    inputs = keras.Input((3,))
    parts = [layers.Dense(1, use_bias=False, name=name)(inputs) for name in ("a", "b")]
    model = hl.Model(inputs, layers.Add()(parts))
    model.set_weights(list(STARTS))
    return model


def stack():
    return hl.Model([keras.Input((3,)), layers.Dense(4, name="encoder"), layers.Dense(1, name="head")])


def train(model, epochs=1):
    model.fit(X, Y, batch_size=4, shuffle=False, epochs=epochs, verbose=0)


def slots(optimizer):
    return {variable.path: ops.convert_to_numpy(variable.value) for variable in optimizer.variables}


def test_a_thawed_part_starts_with_fresh_momentum_and_the_other_keeps_its_own(eagerly):
    model = two_parts()
    model.compile(keras.optimizers.SGD(RATE, momentum=MOMENTUM), loss="mse")
    model.get_layer("a").trainable = False
    train(model)
    model.get_layer("a").trainable = True
    train(model)

    weights, velocities = STARTS.copy(), np.zeros_like(STARTS)
    for step in range(4):
        x, y = (X[:4], Y[:4]) if step % 2 == 0 else (X[4:], Y[4:])
        gradient = 2 / 4 * x.T @ (x @ weights.sum(axis=0) - y)
        for part in (0, 1) if step >= 2 else (1,):
            velocities[part] = MOMENTUM * velocities[part] - RATE * gradient
            weights[part] += velocities[part]
    np.testing.assert_allclose(np.array(model.get_weights()), weights, rtol=1e-4, atol=1e-6)


@optimizers
def test_a_thawed_part_is_trained_and_what_was_known_keeps_its_slots_to_the_bit(make):
    model = stack()
    model.compile(make(), loss="mse")
    model.get_layer("encoder").trainable = False
    train(model)
    before, weights = slots(model.optimizer), model.get_weights()
    model.get_layer("encoder").trainable = True
    with model._steps.running():  # What a run does before its first step.
        after = slots(model.optimizer)
    assert before.keys() <= after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    assert all(not value.any() for path, value in after.items() if path not in before)
    train(model)
    assert all((old != new).any() for old, new in zip(weights, model.get_weights(), strict=True))


@optimizers
def test_a_layer_that_was_added_is_trained(make):
    model = stack()
    model.compile(make(), loss="mse")
    train(model)
    model.add(layers.Dense(1, name="more"))
    before = model.get_weights()
    train(model, epochs=2)
    assert all((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))


def test_by_hand_what_is_extended_trains_on_and_a_step_that_knows_nothing_of_it_says_what_to_do():
    model, optimizer = two_parts(), keras.optimizers.SGD(RATE, momentum=MOMENTUM)

    def step(x, y):
        return hl.minimize(lambda: keras.ops.mean((model(x) - y) ** 2), model, optimizer)

    model.get_layer("a").trainable = False
    hl.function(step)(X, Y)
    model.get_layer("a").trainable = True
    with pytest.raises(
        OptimizerError, match=r"or were thawed, later: handloom.optimizers.add_variables\(optimizer, model\)"
    ):
        hl.function(step)(X, Y)
    before = slots(optimizer)
    add_variables(optimizer, model)
    [added] = set(slots(optimizer)) - set(before)
    assert "a_kernel" in added
    hl.function(step)(X, Y)
    assert (model.get_weights()[0] != STARTS[0]).any()


def test_what_an_optimizer_knows_besides_stays_when_it_is_extended_for_a_part():
    a, b = keras.Variable(1.0, name="a"), keras.Variable(2.0, name="b")
    optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
    for variables in ([a], [b]):
        add_variables(optimizer, variables)
        hl.minimize(lambda: a**2 + b**2, variables, optimizer)
    assert trained_by(optimizer) == [b, a]
    assert {name: float(value) for name, value in slots(optimizer).items() if "momentum" in name} == pytest.approx(
        {"sgd/a_momentum": -2 * RATE, "sgd/b_momentum": -4 * RATE}
    )


@optimizers
def test_slots_stand_in_the_order_of_an_optimizer_that_was_built_at_once(make, tmp_path):
    thawed, whole = stack(), stack()
    for model in (thawed, whole):
        model.compile(make(), loss="mse")
    thawed.get_layer("encoder").trainable = False
    train(thawed)
    thawed.get_layer("encoder").trainable = True
    train(thawed)
    train(whole)
    shapes = [[variable.shape for variable in model.optimizer.variables] for model in (thawed, whole)]
    assert shapes[0] == shapes[1]
    thawed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")  # Warns if the optimizer does not fit.
    for saved, again in zip(thawed.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(saved.value), ops.convert_to_numpy(again.value))


def test_a_part_frozen_and_thawed_again_goes_on_with_its_momentum():
    model = two_parts()
    model.compile(keras.optimizers.SGD(RATE, momentum=MOMENTUM), loss="mse")
    train(model)
    before = slots(model.optimizer)
    model.get_layer("a").trainable = False
    train(model)
    model.get_layer("a").trainable = True
    [momentum_of_a] = [path for path in before if "a_kernel" in path]
    np.testing.assert_array_equal(slots(model.optimizer)[momentum_of_a], before[momentum_of_a])


def test_paths_that_are_the_same_cannot_be_told_apart():
    class Twins(keras.Layer):
        def __init__(self):
            super().__init__()
            self.one, self.two = layers.Dense(1, name="same"), layers.Dense(1, name="same")

        def call(self, x):
            return self.one(x) + self.two(x)

    model = hl.Model([keras.Input((3,)), Twins()])
    model.compile("adam", loss="mse")
    model.layers[0].two.trainable = False
    train(model)
    model.layers[0].two.trainable = True
    with pytest.raises(OptimizerError, match=r"several have the path '.*same/.*names of their own"):
        train(model)


def test_keras_keeps_the_slots_of_an_optimizer_where_we_look():
    variable = keras.Variable(np.ones(2, "float32"), name="w")
    optimizer = keras.optimizers.Adam()
    assert slots_of(optimizer) == []
    optimizer.build([variable])
    assert [slot.name for slot in slots_of(optimizer)] == ["w_momentum", "w_velocity"]
    assert trained_by(optimizer) == [variable]
    forget_slots(optimizer)
    assert [kept.name for kept in optimizer.variables] == ["iteration", "learning_rate"]
