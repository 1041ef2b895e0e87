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

numbers = np.random.default_rng(0)
X = numbers.normal(size=(24, 3)).astype("float32")
Y = numbers.normal(size=(24, 1)).astype("float32")


class Noisy(hl.Model):
    """Everything that is random: initial weights, dropout, noise with and without a generator, the order of data."""

    def __init__(self):
        super().__init__()
        self.hidden, self.drop, self.out = layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(1)
        self.seeds = keras.random.SeedGenerator()

    def call(self, x, training=False):
        x = self.drop(self.hidden(x), training=training)
        return self.out(x)

    def train_step(self, data):
        x, y = data
        x = x + keras.random.normal(ops.shape(x), seed=self.seeds) + 0.1 * keras.random.uniform(ops.shape(x))
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))}


def made():
    model = Noisy()
    model.compile("sgd")
    return model


def losses(model, **options):
    return model.fit(X, Y, batch_size=5, epochs=2, verbose=0, **options).history["loss"]


def weights(model):
    return np.concatenate([np.ravel(weight) for weight in model.get_weights()])


def test_one_seed_gives_the_same_run_to_the_bit(eagerly):
    first, second = made(), made()
    assert losses(first, seed=7) == losses(second, seed=7)
    np.testing.assert_array_equal(weights(first), weights(second))


def test_another_seed_or_none_gives_another_run():
    assert losses(made(), seed=7) != losses(made(), seed=8)
    assert losses(made()) != losses(made())


def test_a_compiled_model_is_seeded_anew():
    model = made()
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
def test_each_part_follows_the_seed_by_itself(part):
    def drawn(seed):
        keras.utils.set_random_seed(random.SystemRandom().randrange(2**31))
        model, seen = made(), []

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
                seen_by.assign(ops.sum(source()[:2]))
                return {}

        class Read(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                seen.append(float(ops.convert_to_numpy(seen_by.value)))

        seen_by = keras.Variable(0.0)
        keep = Keep()
        keep.inner = model
        keep.compile()
        keep.fit(X, Y, batch_size=6, verbose=0, seed=seed, callbacks=[Read()])
        return seen

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_what_has_a_seed_of_its_own_keeps_it():
    def mask(seed):
        drop = layers.Dropout(0.5, seed=5)
        kernel = keras.initializers.GlorotUniform(seed=6)
        dense = layers.Dense(2, kernel_initializer=kernel)
        out = {}

        def step(x):
            return {"sum": ops.sum(drop(dense(x), training=True))}

        out = hl.fit(step, X, state=[drop, dense], seed=seed, verbose=0).history["sum"]
        return out, ops.convert_to_numpy(dense.kernel.value).tolist()

    assert mask(1) == mask(2)


def test_hl_fit_seeds_what_its_state_names(eagerly):
    def run(seed):
        drop, dense, seeds = layers.Dropout(0.5), layers.Dense(2), keras.random.SeedGenerator()

        def step(x):
            noise = keras.random.normal(ops.shape(x), seed=seeds) + keras.random.normal(ops.shape(x))
            return {"sum": ops.sum(drop(dense(x + noise), training=True))}

        state = {"layers": [drop, dense], "seeds": seeds}
        return hl.fit(step, X, state=state, seed=seed, verbose=0).history["sum"]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_data_loader_follows_the_seed_on_every_backend():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(X, batch_size=6, shuffle=True)

    def run(seed):
        order = []
        hl.fit(
            lambda x: {"first": ops.sum(x[0])},
            loader,
            seed=seed,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: order.append(logs["first"]))
            ],
        )
        return order

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5, True, "1"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed takes a whole number from 0 to 2147483647; received"):
        made().fit(X, Y, seed=seed, verbose=0)
    with pytest.raises(ValueError, match="seed takes a whole number"):
        hl.fit(lambda x: {}, X, seed=seed, verbose=0)


def test_without_a_seed_nothing_global_is_set():
    before = np.random.get_state()[1].tolist()
    hl.fit(lambda x: {"x": ops.sum(x)}, X, verbose=0)
    assert np.random.get_state()[1].tolist() == before


def test_keras_keeps_seed_generators_where_we_look():
    assert seed_generators_of(layers.Dropout(0.5))[0].get_config()["seed"] is None
    assert seed_generators_of(layers.Dropout(0.5, seed=3))[0].get_config()["seed"] == 3


# -------------------------------------------------------- nothing random is frozen


def test_an_unseeded_random_operation_draws_anew_in_each_step(eagerly):
    draw = hl.function(lambda: keras.random.normal((4,)))
    first, second = draw(), draw()
    assert not np.array_equal(ops.convert_to_numpy(first), ops.convert_to_numpy(second))


def test_numbers_of_numpy_that_a_compiled_step_freezes_are_told_of():
    frozen = hl.function(lambda x: x + np.random.normal())
    with pytest.warns(HandloomWarning, match=r"drew from np.random while it was compiled.*keras.random") as told:
        first, second = frozen(X), frozen(X)
    assert len(told) == 1
    np.testing.assert_array_equal(ops.convert_to_numpy(first), ops.convert_to_numpy(second))


def test_op_by_op_numbers_of_numpy_are_drawn_anew_and_nothing_is_said():
    with hl.run_eagerly(True):
        live = hl.function(lambda x: x + np.random.normal())
        assert not np.array_equal(ops.convert_to_numpy(live(X)), ops.convert_to_numpy(live(X)))
