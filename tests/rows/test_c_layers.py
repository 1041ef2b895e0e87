"""Rows C5 and C6: custom layers, and models of custom blocks."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._keras import layers_of
from tests.numbers import close, each_close, numpy, same
from tests.rows.components import (
    IN_EACH_WAY,
    InLoop,
    InModel,
    assert_trains_on_exactly,
    by_hand,
    registered,
    ways,
)
from tests.rows.curves import start
from tests.rows.real_data import diabetes

RATE = 0.1
X, Y = diabetes()
HALVES = (X[:, :5], X[:, 5:])


# ------------------------------------------------------------------- C5, custom layers


@registered
class Exponential(keras.Layer):
    """Has nothing to build."""

    def call(self, z):
        return ops.exp(z)

    def compute_output_shape(self, shape):
        return shape


@registered
class CustomDense(keras.Layer):
    """Has weights to build, and a config."""

    def __init__(self, units, activation=None, **options):
        super().__init__(**options)
        self.units, self.activation = units, keras.activations.get(activation)

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), initializer="glorot_normal", name="kernel")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

    def call(self, x):
        return self.activation(x @ self.kernel + self.bias)

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.units)

    def get_config(self):
        activation = keras.activations.serialize(self.activation)
        return super().get_config() | {"units": self.units, "activation": activation}


@registered
class SumDifferenceProduct(keras.Layer):
    """Has two inputs and three outputs."""

    def call(self, inputs):
        one, other = inputs
        return one + other, one - other, one * other

    def compute_output_shape(self, shapes):
        return (shapes[0],) * 3


@registered
class Noisy(keras.Layer):
    """Adds noise in training only."""

    def __init__(self, stddev, **options):
        super().__init__(**options)
        self.stddev = stddev
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x, training=False):
        return x + self.stddev * keras.random.normal(ops.shape(x), seed=self.seed) if training else x

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return super().get_config() | {"stddev": self.stddev}


def sum_difference_product(one, other):
    return one + other, one - other, one * other


KERNEL, BIAS = start((10, 3), 3)
# By name: how to create the layer, its inputs, its weights, and its outputs in NumPy.
ALONE = {
    "exponential": (Exponential, X, [], np.exp(X)),
    "dense": (lambda: CustomDense(3, "tanh"), X, [KERNEL, BIAS], np.tanh(X @ KERNEL + BIAS)),
    "two to three": (SumDifferenceProduct, HALVES, [], sum_difference_product(*HALVES)),
    "noisy": (lambda: Noisy(0.5), X, [], X),
}


@pytest.mark.parametrize(("make", "x", "weights", "expected"), ALONE.values(), ids=ALONE)
def test_c5_a_layer_alone_in_a_function_computes_as_numpy_does_also_from_its_config(
    make, x, weights, expected, eagerly
):
    for layer in (make(), type(make()).from_config(make().get_config())):
        layer(x)
        layer.set_weights(weights)
        found = keras.tree.flatten(hl.function(layer)(x))
        each_close(found, keras.tree.flatten(expected))
        batches = keras.tree.map_structure(lambda array: keras.KerasTensor((None, *array.shape[1:])), x)
        symbolic = [tensor.shape for tensor in keras.tree.flatten(layer(batches))]
        assert symbolic == [(None, *tensor.shape[1:]) for tensor in found]


def linear():
    return layers.Dense(1, use_bias=False, kernel_initializer="zeros")


COUNTS = np.round(4 * (Y - Y.min()))
# By name: the layers, their data, and their loss.
INSIDE = {
    "exponential": (lambda: [linear(), Exponential()], (X, COUNTS), "poisson"),
    "dense": (lambda: [CustomDense(6, "tanh"), CustomDense(1)], (X, Y), "mse"),
    "two to three": (lambda: [SumDifferenceProduct(), layers.Concatenate(), linear()], (HALVES, Y), "mse"),
}


@ways
@pytest.mark.parametrize(("make", "data", "loss"), INSIDE.values(), ids=INSIDE)
def test_c5_a_layer_inside_a_model_trains_and_trains_on_exactly_when_loaded(make, data, loss, way, tmp_path, shown):
    used = way(make(), data[0], keras.optimizers.Adam(0.01), loss)
    losses = used.train(data)["loss"]
    assert losses[1] < losses[0]
    assert_trains_on_exactly(used, data, tmp_path)
    shown(f"trains on after loading, bitwise identical, {IN_EACH_WAY}")


@ways
def test_c5_a_layer_with_noise_in_training_adds_it_to_the_loss_of_training_only(way, tmp_path, shown):
    """Noise on the inputs of a linear model adds its variance times the square of the weights to the squared error."""
    [kernel] = start((10, 1))
    used = way([Noisy(1.0), linear()], X, keras.optimizers.SGD(0.0))
    used.net.set_weights([kernel])
    history = used.train((X, Y), epochs=10)["loss"]
    off, added = X @ kernel - Y, np.sum(kernel**2)
    deviation = np.sqrt(np.mean(4 * off**2 * added + 2 * added**2) / (10 * len(X)))
    assert abs(np.mean(history) - np.mean(off**2) - added) < 4 * deviation < added / 2
    assert len(set(history)) == 10
    loaded = used.reloaded(tmp_path)
    close([used.net(X), loaded.net(X)], [X @ kernel] * 2)
    assert [layer.stddev for layer in layers_of(loaded.net) if isinstance(layer, Noisy)] == [1.0]
    shown(f"noise in training adds {np.mean(history) - np.mean(off**2):.2f} to the loss, {added:.2f} expected")


def test_c5_checkpointer_restores_the_noise_of_a_layer_exactly(tmp_path):
    """A checkpoint holds the state of the random numbers of layers; a `.keras` file does not."""
    used = by_hand([Noisy(0.5), CustomDense(4, "tanh"), linear()], X, keras.optimizers.Adam(0.01))
    assert_trains_on_exactly(used, (X, Y), tmp_path)


# ------------------------------------------------------------ C6, blocks in a model


@registered
class ResidualBlock(keras.Layer):
    """Adds the output of dense layers to their input."""

    def __init__(self, depth, units, **options):
        super().__init__(**options)
        self.depth, self.units = depth, units
        self.hidden = [layers.Dense(units, "tanh") for _ in range(depth)]

    def build(self, shape):
        for layer in self.hidden:
            layer.build(shape)

    def call(self, x):
        z = x
        for layer in self.hidden:
            z = layer(z)
        return x + z

    def get_config(self):
        return super().get_config() | {"depth": self.depth, "units": self.units}


@registered
class ResidualRegressor(hl.Model):
    """Calls its first block three times, and the second once."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.first, self.out = layers.Dense(units, "tanh"), layers.Dense(1)
        self.again, self.once = ResidualBlock(2, units), ResidualBlock(2, units)

    def call(self, x):
        z = self.first(x)
        for _ in range(3):
            z = self.again(z)
        return self.out(self.once(z))

    def get_config(self):
        return super().get_config() | {"units": self.units}


UNITS, WEIGHTS, PARAMETERS = 4, 12, 10 * 4 + 4 + 4 * (4 * 4 + 4) + 4 + 1


def functional_regressor():
    first, again, once = layers.Dense(UNITS, "tanh"), ResidualBlock(2, UNITS), ResidualBlock(2, UNITS)
    inputs = keras.Input((10,))
    z = first(inputs)
    for _ in range(3):
        z = again(z)
    return hl.Model(inputs, layers.Dense(1)(once(z)))


def subclassed_regressor():
    model = ResidualRegressor(UNITS)
    model(X[:1])
    return model


REGRESSORS = {
    "functional": lambda optimizer: InModel(functional_regressor(), optimizer),
    "subclassed": lambda optimizer: InModel(subclassed_regressor(), optimizer),
    "own loop": lambda optimizer: InLoop(subclassed_regressor(), optimizer),
}
regressors = pytest.mark.parametrize("make", REGRESSORS.values(), ids=REGRESSORS)


def blocks_of(net):
    return [layer for layer in layers_of(net) if isinstance(layer, ResidualBlock)]


@regressors
def test_c6_weights_of_nested_blocks_are_found_each_once(make, shown):
    net = make(keras.optimizers.SGD(RATE)).net
    assert len(net.weights) == len(net.trainable_variables) == WEIGHTS
    assert net.count_params() == PARAMETERS
    one, _ = blocks_of(net)
    one.hidden[1].trainable = False
    assert len(net.trainable_variables) == WEIGHTS - 2
    shown(f"{len(net.weights)} weights found, each once")


@regressors
def test_c6_a_saved_model_of_blocks_trains_on_exactly_when_loaded(make, tmp_path, shown):
    loaded = assert_trains_on_exactly(make(keras.optimizers.Adam(0.01)), (X, Y), tmp_path)
    assert loaded.net.count_params() == PARAMETERS
    shown("trains on after loading, bitwise identical")


@regressors
def test_c6_load_weights_makes_a_new_model_equal(make, tmp_path, shown):
    used, fresh = make(keras.optimizers.SGD(RATE)), make(keras.optimizers.SGD(RATE))
    used.train((X, Y), epochs=1)
    used.net.save_weights(tmp_path / "net.weights.h5")
    assert not np.array_equal(numpy(fresh.net(X)), numpy(used.net(X)))
    fresh.net.load_weights(tmp_path / "net.weights.h5")
    same(fresh.net(X), used.net(X))
    shown("the weights alone make a new model equal")
