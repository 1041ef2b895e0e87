"""Rows C5 and C6: own layers, and models made of own blocks."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._keras import layers_of
from tests.rows.components import (
    IN_EACH_WAY,
    InLoop,
    InModel,
    by_hand,
    goes_on_as_if_it_had_never_been_saved,
    in_numpy,
    registered,
    ways,
)
from tests.rows.curves import start
from tests.rows.real_data import diabetes

RATE = 0.1
X, Y = diabetes()
HALVES = (X[:, :5], X[:, 5:])


# ------------------------------------------------------------------- C5, own layers


@registered
class Exponential(keras.Layer):
    """Nothing to build."""

    def call(self, z):
        return ops.exp(z)

    def compute_output_shape(self, shape):
        return shape


@registered
class OwnDense(keras.Layer):
    """Weights to build, and a config."""

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
    """Two inputs, three outputs."""

    def call(self, inputs):
        one, other = inputs
        return one + other, one - other, one * other

    def compute_output_shape(self, shapes):
        return (shapes[0],) * 3


@registered
class Noisy(keras.Layer):
    """Another thing in training than at other times."""

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


KERNEL, BIAS = start((10, 3), 3)
# How each is made, its inputs, its weights, and what NumPy makes of them.
ALONE = {
    "exponential": (Exponential, X, [], np.exp(X)),
    "dense": (lambda: OwnDense(3, "tanh"), X, [KERNEL, BIAS], np.tanh(X @ KERNEL + BIAS)),
    "two to three": (
        SumDifferenceProduct,
        HALVES,
        [],
        (HALVES[0] + HALVES[1], HALVES[0] - HALVES[1], HALVES[0] * HALVES[1]),
    ),
    "noisy": (lambda: Noisy(0.5), X, [], X),
}
alone = pytest.mark.parametrize(("make", "x", "weights", "expected"), ALONE.values(), ids=ALONE)


def shapes_of(arrays):
    return keras.tree.map_structure(lambda array: tuple(array.shape), arrays)


def assert_close(found, expected):
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(one), other, rtol=1e-5, atol=1e-6)


@alone
def test_c5_a_layer_alone_computes_as_numpy_does_and_knows_its_shapes(make, x, weights, expected, eagerly):
    layer = make()
    layer(x)
    layer.set_weights(weights)
    found = hl.function(layer)(x)
    assert_close(found, expected)
    batches = keras.tree.map_structure(lambda array: keras.KerasTensor((None, *array.shape[1:])), x)
    symbolic = [tensor.shape for tensor in keras.tree.flatten(layer(batches))]
    assert symbolic == [(None, *tensor.shape[1:]) for tensor in keras.tree.flatten(found)]


@alone
def test_c5_a_config_makes_the_same_layer(make, x, weights, expected):
    again = type(make()).from_config(make().get_config())
    again(x)
    again.set_weights(weights)
    assert_close(again(x), expected)


def of_exponential(weights, x, y):
    """Poisson regression: the exponential keeps the mean of counts above zero."""
    [kernel] = weights
    z = x @ kernel
    return [kernel - RATE * x.T @ (np.exp(z) - y) / len(x)], (np.exp(z) - y * z)[:, 0]


def of_dense(weights, x, y):
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    off = hidden @ w2 + b2 - y
    slope = 2 * off / len(x)
    of_hidden = slope @ w2.T * (1 - hidden**2)
    gradients = x.T @ of_hidden, of_hidden.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)
    return [weight - RATE * gradient for weight, gradient in zip(weights, gradients, strict=True)], off[:, 0] ** 2


def of_two_to_three(weights, one, other, y):
    [kernel] = weights
    features = np.concatenate([one + other, one - other, one * other], axis=1)
    off = features @ kernel - y
    return [kernel - 0.01 * features.T @ (2 * off / len(off))], off[:, 0] ** 2


def linear():
    return layers.Dense(1, use_bias=False, kernel_initializer="zeros")


COUNTS = np.round(4 * (Y - Y.min()))
# How each is put among others, its data, loss and rate, and the same in NumPy: one update, and the start.
INSIDE = {
    "exponential": (
        lambda: [linear(), Exponential()],
        (X, COUNTS),
        ("poisson", RATE),
        (of_exponential, [np.zeros((10, 1))]),
    ),
    "dense": (
        lambda: [OwnDense(6, "tanh"), OwnDense(1)],
        (X, Y),
        ("mse", RATE),
        (of_dense, start((10, 6), 6, (6, 1), 1)),
    ),
    "two to three": (
        lambda: [SumDifferenceProduct(), layers.Concatenate(), linear()],
        (HALVES, Y),
        ("mse", 0.01),
        (of_two_to_three, [np.zeros((15, 1))]),
    ),
}


@ways
@pytest.mark.parametrize(("make", "data", "options", "by_numpy"), INSIDE.values(), ids=INSIDE)
def test_c5_a_layer_inside_others_trains_as_in_numpy(make, data, options, by_numpy, way, shown):
    (loss, rate), (update, weights) = options, by_numpy
    used = way(make(), data[0], keras.optimizers.SGD(rate), loss)
    used.net.set_weights(weights)
    history = used.train(data)
    losses, weights = in_numpy(update, data, weights)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    for found, expected in zip(used.net.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    shown(f"trains as in NumPy, {IN_EACH_WAY}")


def test_c5_noise_alone_is_normal_and_new_at_each_call_of_a_compiled_step(eagerly):
    layer = Noisy(0.5)
    step = hl.function(lambda x: layer(x, training=True))
    one, other = (ops.convert_to_numpy(step(np.zeros((200, 500), "float32"))) for _ in range(2))
    for drawn in (one, other):
        assert abs(drawn.mean()) < 4 * 0.5 / np.sqrt(drawn.size)
        assert abs(drawn.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * drawn.size)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)


@ways
def test_c5_noise_is_in_the_loss_of_training_and_in_nothing_else(way, shown):
    """Noise on the inputs of a linear model adds its variance times the square of the weights to the squared error."""
    [kernel] = start((10, 1))
    used = way([Noisy(1.0), linear()], X, keras.optimizers.SGD(0.0))
    used.net.set_weights([kernel])
    history = used.train((X, Y), epochs=10)["loss"]
    off, added = X @ kernel - Y, np.sum(kernel**2)
    deviation = np.sqrt(np.mean(4 * off**2 * added + 2 * added**2) / (10 * len(X)))
    assert abs(np.mean(history) - np.mean(off**2) - added) < 4 * deviation < added / 2
    assert len(set(history)) == 10
    np.testing.assert_allclose(ops.convert_to_numpy(used.net(X)), X @ kernel, rtol=1e-5, atol=1e-6)
    shown(f"noise in training adds {np.mean(history) - np.mean(off**2):.2f} to the loss, of {added:.2f} to be expected")


@ways
@pytest.mark.parametrize(("make", "data"), [row[:2] for row in INSIDE.values()], ids=INSIDE)
def test_c5_what_is_saved_with_an_own_layer_in_it_goes_on_exactly(make, data, way, tmp_path, shown):
    goes_on_as_if_it_had_never_been_saved(way(make(), data[0], keras.optimizers.Adam(0.01)), data, tmp_path)
    shown("trains on to the bit after loading")


@ways
def test_c5_noise_is_as_strong_as_it_was_and_nowhere_else_when_it_is_loaded(way, tmp_path):
    used = way([Noisy(0.5), OwnDense(1)], X)
    loaded = used.reloaded(tmp_path)
    assert [layer.stddev for layer in layers_of(loaded.net) if isinstance(layer, Noisy)] == [0.5]
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded.net(X)), ops.convert_to_numpy(used.net(X)))


def test_c5_noise_goes_on_exactly_from_a_checkpoint(tmp_path):
    """A `.keras` file does not hold where the random numbers of layers stand; a checkpoint does."""
    used = by_hand([Noisy(0.5), OwnDense(4, "tanh"), linear()], X, keras.optimizers.Adam(0.01))
    goes_on_as_if_it_had_never_been_saved(used, (X, Y), tmp_path)


# ------------------------------------------------------------ C6, blocks in a model


@registered
class ResidualBlock(keras.Layer):
    """What dense layers make of an input is added to it."""

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
    """Goes through its first block three times, and through the second once."""

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


UNITS = 4
BLOCK = ((UNITS, UNITS), UNITS) * 2
WEIGHTS = start((10, UNITS), UNITS, *BLOCK, *BLOCK, (UNITS, 1), 1)


def residual_parts():
    return layers.Dense(UNITS, "tanh"), ResidualBlock(2, UNITS), ResidualBlock(2, UNITS), layers.Dense(1)


def functional_regressor(optimizer):
    first, again, once, out = residual_parts()
    inputs = keras.Input((10,))
    z = first(inputs)
    for _ in range(3):
        z = again(z)
    return InModel(hl.Model(inputs, out(once(z))), optimizer)


def subclassed_regressor(optimizer):
    model = ResidualRegressor(UNITS)
    model(X[:1])
    return InModel(model, optimizer)


def regressor_in_a_loop(optimizer):
    model = ResidualRegressor(UNITS)
    model(X[:1])
    return InLoop(model, optimizer)


REGRESSORS = {"functional": functional_regressor, "subclassed": subclassed_regressor, "own loop": regressor_in_a_loop}
regressors = pytest.mark.parametrize("make", REGRESSORS.values(), ids=REGRESSORS)


def in_order(net):
    """Its variables in the order of `WEIGHTS`, whatever its own is."""
    blocks = [layer for layer in layers_of(net) if isinstance(layer, ResidualBlock)]
    dense = [layer for layer in net.layers if isinstance(layer, layers.Dense)]
    parts = [dense[0], *blocks, dense[1]]
    return [variable for part in parts for variable in part.trainable_variables]


def set_start(net):
    for variable, value in zip(in_order(net), WEIGHTS, strict=True):
        variable.assign(value)


def of_residual_regressor(weights, x):
    w_first, b_first, *blocks, w_out, b_out = weights
    z = np.tanh(x @ w_first + b_first)
    for w1, b1, w2, b2 in (blocks[:4], blocks[:4], blocks[:4], blocks[4:]):
        z = z + np.tanh(np.tanh(z @ w1 + b1) @ w2 + b2)
    return z @ w_out + b_out


def by_finite_differences(weights, x, y):
    """One update by gradients that know nothing of how they are derived."""

    def losses():
        return (of_residual_regressor(weights, x) - y)[:, 0] ** 2

    weights, gradients = [np.array(weight, "float64") for weight in weights], []
    before = losses()
    for weight in weights:
        gradient = np.empty_like(weight)
        for place in np.ndindex(weight.shape):
            value, sides = weight[place], []
            for step in (1e-5, -1e-5):
                weight[place] = value + step
                sides.append(losses().mean())
            weight[place] = value
            gradient[place] = (sides[0] - sides[1]) / 2e-5
        gradients.append(gradient)
    return [weight - RATE * gradient for weight, gradient in zip(weights, gradients, strict=True)], before


@regressors
def test_c6_a_block_that_is_used_again_and_again_trains_as_finite_differences_say(make, shown):
    used = make(keras.optimizers.SGD(RATE))
    set_start(used.net)
    history = used.train((X, Y))
    losses, weights = in_numpy(by_finite_differences, (X, Y), WEIGHTS)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    for found, expected in zip(in_order(used.net), weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-3, atol=1e-4)
    shown(f"loss {history['loss'][-1]:.3f} as by finite differences, {IN_EACH_WAY}")


@regressors
def test_c6_nested_layers_are_found_each_once(make, shown):
    net = make(keras.optimizers.SGD(RATE)).net
    assert len(net.weights) == len(net.trainable_variables) == len(WEIGHTS)
    assert net.count_params() == sum(weight.size for weight in WEIGHTS)
    blocks = [layer for layer in layers_of(net) if isinstance(layer, ResidualBlock)]
    assert len(blocks) == 2
    blocks[0].hidden[1].trainable = False
    assert len(net.trainable_variables) == len(WEIGHTS) - 2
    shown(f"{len(net.weights)} weights found, each once")


def test_c6_an_optimizer_by_name_trains_a_layer_deep_inside():
    used = subclassed_regressor({"again.hidden": keras.optimizers.SGD(RATE), "*": keras.optimizers.SGD(0.0)})
    set_start(used.net)
    used.train((X, Y), epochs=1)
    moved = [
        (ops.convert_to_numpy(now) != before).any() for now, before in zip(in_order(used.net), WEIGHTS, strict=True)
    ]
    assert moved == [False] * 2 + [True] * 4 + [False] * 6


@regressors
def test_c6_a_whole_model_goes_on_exactly_after_it_was_saved(make, tmp_path, shown):
    loaded = goes_on_as_if_it_had_never_been_saved(make(keras.optimizers.Adam(0.01)), (X, Y), tmp_path)
    assert loaded.net.count_params() == sum(weight.size for weight in WEIGHTS)
    shown("trains on to the bit after loading")


@regressors
def test_c6_weights_alone_make_a_new_model_the_same(make, tmp_path, shown):
    used, fresh = make(keras.optimizers.SGD(RATE)), make(keras.optimizers.SGD(RATE))
    used.train((X, Y), epochs=1)
    used.net.save_weights(tmp_path / "net.weights.h5")
    assert not np.array_equal(ops.convert_to_numpy(fresh.net(X)), ops.convert_to_numpy(used.net(X)))
    fresh.net.load_weights(tmp_path / "net.weights.h5")
    np.testing.assert_array_equal(ops.convert_to_numpy(fresh.net(X)), ops.convert_to_numpy(used.net(X)))
    shown("weights alone make a new model the same")
