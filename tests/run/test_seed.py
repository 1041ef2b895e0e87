"""One seed makes two runs the same; without it they differ."""

import random
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._keras import seed_generators_of
from handloom.errors import HandloomWarning
from tests.numbers import normal, numpy, same, same_values

X, Y = normal(24, 3), normal(24, 1, seed=1)
hook = keras.callbacks.LambdaCallback


class Noisy(hl.Model):
    """Everything that is random: initial weights, dropout, noise with and without a generator, the order of data."""

    def __init__(self):
        super().__init__()
        self.hidden, self.drop, self.out = layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(1)
        self.seeds = keras.random.SeedGenerator()

    def call(self, x, training=False):
        return self.out(self.drop(self.hidden(x), training=training))

    def train_step(self, data):
        x, y = data
        x = x + keras.random.normal(ops.shape(x), seed=self.seeds) + 0.1 * keras.random.uniform(ops.shape(x))
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))}


def noisy():
    model = Noisy()
    model.compile("sgd")
    return model


def losses(model, **options):
    return model.fit(X, Y, batch_size=5, epochs=2, verbose=0, **options).history["loss"]


def test_fit_with_one_seed_gives_bitwise_identical_runs_and_without_a_seed_different_ones(eagerly):
    first, second = noisy(), noisy()
    assert losses(first, seed=7) == losses(second, seed=7)
    same_values(first, second)
    assert losses(noisy(), seed=7) != losses(noisy(), seed=8)
    assert losses(noisy()) != losses(noisy())


def test_fit_seeds_a_model_again_that_is_already_compiled():
    model = noisy()
    losses(model, seed=1)
    start = model.get_weights()
    first = losses(model, seed=7)
    model.set_weights(start)
    assert losses(model, seed=7) == first


@pytest.mark.parametrize(
    "part",
    [
        "weights",
        "dropout",
        "generator",
        "unseeded",
        "order",
        pytest.param("tensorflow", marks=pytest.mark.backend("tensorflow"), id="TensorFlow's own generator"),
    ],
)
def test_fit_seeds_each_source_of_random_numbers_by_itself(part):
    def drawn(seed):
        keras.utils.set_random_seed(random.SystemRandom().randrange(2**31))
        model, seen = noisy(), []

        class Keep(hl.Model):
            def train_step(self, data):
                x, _ = data
                source = {
                    "weights": lambda: model(x),
                    "dropout": lambda: model.drop(x, training=True),
                    "generator": lambda: keras.random.normal((3,), seed=model.seeds),
                    "unseeded": lambda: keras.random.normal((3,)),
                    "order": lambda: x,
                    "tensorflow": lambda: sys.modules[part].random.get_global_generator().normal((3,)),
                }[part]
                value.assign(ops.sum(source()[:2]))
                return {}

        value, keep = keras.Variable(0.0), Keep()
        keep.inner = model
        keep.compile()
        read = hook(on_train_batch_end=lambda batch, logs: seen.append(float(numpy(value))))
        keep.fit(X, Y, batch_size=6, verbose=0, seed=seed, callbacks=[read])
        return seen

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_fit_seeds_no_object_that_has_a_seed_of_its_own():
    def run(seed):
        drop = layers.Dropout(0.5, seed=5)
        dense = layers.Dense(2, kernel_initializer=keras.initializers.GlorotUniform(seed=6))
        step = lambda x: {"sum": ops.sum(drop(dense(x), training=True))}  # noqa: E731
        history = hl.fit(step, X, state=[drop, dense], seed=seed, verbose=0).history
        return history["sum"], numpy(dense.kernel).tolist()

    assert run(1) == run(2)


def test_fit_seeds_the_state_of_a_plain_step(eagerly):
    def run(seed):
        drop, dense, seeds = layers.Dropout(0.5), layers.Dense(2), keras.random.SeedGenerator()

        def step(x):
            noise = keras.random.normal(ops.shape(x), seed=seeds) + keras.random.normal(ops.shape(x))
            return {"sum": ops.sum(drop(dense(x + noise), training=True))}

        state = {"layers": [drop, dense], "seeds": seeds}
        return hl.fit(step, X, state=state, seed=seed, verbose=0).history["sum"]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_fit_seeds_a_data_loader_on_every_backend():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(X, batch_size=6, shuffle=True)

    def run(seed):
        order = []
        note = hook(on_train_batch_end=lambda batch, logs: order.append(logs["first"]))
        hl.fit(lambda x: {"first": ops.sum(x[0])}, loader, seed=seed, verbose=0, callbacks=[note])
        return order

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5, True, "1"])
def test_fit_refuses_a_seed_that_is_not_a_whole_number_in_range(seed):
    words = rf"fit\(seed=...\) takes a .*; received {seed!r}\."
    with pytest.raises(ValueError, match=words):
        noisy().fit(X, Y, seed=seed, verbose=0)
    with pytest.raises(ValueError, match=words):
        hl.fit(lambda x: {}, X, seed=seed, verbose=0)


def test_fit_without_a_seed_leaves_the_random_state_of_numpy_as_it_is():
    before = np.random.get_state()[1].tolist()
    hl.fit(lambda x: {"x": ops.sum(x)}, X, verbose=0)
    assert np.random.get_state()[1].tolist() == before


def test_seed_generators_of_finds_those_of_keras_layers():
    for seed in (None, 3):
        assert seed_generators_of(layers.Dropout(0.5, seed=seed))[0].get_config()["seed"] == seed


# ----------------------------------------------------- random numbers in a compiled step


def test_function_draws_new_numbers_in_each_step_from_an_unseeded_operation(eagerly):
    draw = hl.function(lambda: keras.random.normal((4,)))
    assert not np.array_equal(numpy(draw()), numpy(draw()))


def test_function_warns_of_numbers_of_numpy_that_it_makes_constant():
    constant = hl.function(lambda x: x + np.random.normal())
    with pytest.warns(HandloomWarning, match=r"np.random while it was compiled.*keras.random") as warned:
        first, second = constant(X), constant(X)
    assert len(warned) == 1
    same(first, second)
    with hl.run_eagerly(True):  # Without a warning.
        assert not np.array_equal(numpy(constant(X)), numpy(constant(X)))
