"""One seed makes two runs the same; without it they differ."""

import random
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
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


SOURCES = {
    "weights": lambda model, x: model(x),
    "dropout": lambda model, x: model.drop(x, training=True),
    "generator": lambda model, x: keras.random.normal((3,), seed=model.seeds),
    "unseeded": lambda model, x: keras.random.normal((3,)),
    "order": lambda model, x: x,
    "tensorflow": lambda model, x: sys.modules["tensorflow"].random.get_global_generator().normal((3,)),
}
on_tensorflow = pytest.param("tensorflow", marks=pytest.mark.backend("tensorflow"))


@pytest.mark.parametrize("source", [*(name for name in SOURCES if name != "tensorflow"), on_tensorflow])
def test_fit_seeds_each_source_of_random_numbers_by_itself(source):
    class Draws(Noisy):
        def train_step(self, data):
            return {"loss": ops.sum(SOURCES[source](self, data[0])[:2])}

    def drawn(seed):
        keras.utils.set_random_seed(random.SystemRandom().randrange(2**31))
        model = Draws()
        model.compile()
        return losses(model, seed=seed)

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


@pytest.mark.parametrize("own", [None, 5])
def test_fit_seeds_the_state_of_a_plain_step_except_objects_with_a_seed_of_their_own(own, eagerly):
    def run(seed):
        drop, generator = layers.Dropout(0.5, seed=own), keras.random.SeedGenerator(own)
        dense = layers.Dense(2, kernel_initializer=keras.initializers.GlorotUniform(own))

        def step(x):
            noise = keras.random.normal(ops.shape(x), seed=generator)
            return {"sum": ops.sum(drop(dense(x + noise), training=True))}

        state = {"layers": [drop, dense], "generator": generator}
        return hl.fit(step, X, state=state, seed=seed, verbose=0).history["sum"]

    assert run(1) == run(1)
    assert (run(1) == run(2)) == bool(own)


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


def test_set_random_seed_gives_the_numbers_of_keras_and_reaches_compiled_functions():
    def drawn(seed_all):
        keras.utils.clear_session(free_memory=False)  # Forgets the global generator.
        seed_all(3)
        weights = layers.Dense(2)
        weights.build((None, 2))
        values = weights.kernel, keras.random.SeedGenerator().state, keras.random.normal((3,))
        return random.random(), np.random.rand(), *(number for value in values for number in numpy(value).ravel())

    assert drawn(hl.set_random_seed) == drawn(keras.utils.set_random_seed)
    noise = hl.function(lambda: keras.random.normal((3,)))
    noise()
    hl.set_random_seed(5)
    first = noise()
    hl.set_random_seed(5)
    same(noise(), first)


@pytest.mark.once
def test_set_random_seed_and_fit_import_tensorflow_on_no_other_backend():
    code = (
        "import sys, numpy as np, handloom as hl\n"
        "hl.set_random_seed(0); hl.fit(lambda x: {'x': x[0]}, np.ones(4), seed=1, verbose=0)\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fit_without_a_seed_leaves_the_random_state_of_numpy_as_it_is():
    before = np.random.get_state()[1].tolist()
    hl.fit(lambda x: {"x": ops.sum(x)}, X, verbose=0)
    assert np.random.get_state()[1].tolist() == before


# ----------------------------------------------------- random numbers in a compiled step


def test_function_warns_of_numbers_of_numpy_that_it_makes_constant():
    constant = hl.function(lambda x: x + np.random.normal())
    with pytest.warns(HandloomWarning, match=r"np.random while it was compiled.*keras.random") as warned:
        first, second = constant(X), constant(X)
    assert len(warned) == 1
    same(first, second)
    with hl.run_eagerly(True):  # Without a warning.
        assert not np.array_equal(numpy(constant(X)), numpy(constant(X)))
