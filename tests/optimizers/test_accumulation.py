"""`GradientAccumulation` equals the larger batch; `UpdateEvery` updates on every n-th step."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning
from handloom.optimizers import (
    ClipByGlobalNorm,
    GradientAccumulation,
    GradientTransforms,
    UpdateEvery,
    WeightAveraging,
    averaged_weights,
)
from tests.models import compiled, fit, sequential
from tests.numbers import close, each_close, each_same, normal, numpy

RANDOM = np.random.default_rng(0)
X = normal(26, 4)
Y = X @ np.array([[1.0], [-2.0], [0.5], [1.0]], "float32")
SGD, MSE = keras.optimizers.SGD, keras.losses.MeanSquaredError
OPTIMIZERS = {
    "SGD": lambda: SGD(0.05),
    "momentum": lambda: SGD(0.02, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "clipped": lambda: SGD(0.05, global_clipnorm=0.5),
    "transformed": lambda: GradientTransforms(SGD(1.0), [ClipByGlobalNorm(0.1)]),
    "scheduled": lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.5)),
}


def net(optimizer, loss="mse", regularizer="l2", **options):
    keras.utils.set_random_seed(0)
    parts = layers.Dense(3, "tanh"), layers.Dense(1, kernel_regularizer=regularizer)
    return compiled(sequential(*parts, inputs=4), optimizer, loss, **options)


def trained_both_ways(make, steps, data=(X, Y), model=net, batch_size=4, **options):
    """A model trained on large batches, and one that accumulates small ones; they have the same weights."""
    large, small = model(make()), model(GradientAccumulation(make(), steps))
    fit(large, *data, batch_size=batch_size * steps, epochs=2, **options)
    fit(small, *data, batch_size=batch_size, epochs=2, **options)
    each_close(small.get_weights(), large.get_weights())
    assert int(numpy(small.optimizer.iterations)) == int(numpy(large.optimizer.iterations))
    return large, small


# With 7 steps per epoch, the last window is incomplete.
@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradient_accumulation_equals_the_larger_batch(kind, steps):
    trained_both_ways(OPTIMIZERS[kind], steps)


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 2), (None, 3), (0.5, 8)])
def test_gradient_accumulation_averages_the_weights_of_the_larger_batch(decay, steps):
    models = trained_both_ways(lambda: WeightAveraging(OPTIMIZERS["momentum"](), decay), steps)
    with averaged_weights(models[0]), averaged_weights(models[1]):
        each_close(*(model.get_weights() for model in models))


def test_gradient_accumulation_leaves_a_layer_frozen_between_two_runs_which_momentum_would_move():
    model = net(GradientAccumulation(OPTIMIZERS["momentum"](), 3))
    fit(model, X, Y, batch_size=4)
    model.layers[-1].trainable = False
    first, frozen = model.layers[0].get_weights(), model.layers[-1].get_weights()
    fit(model, X, Y, batch_size=4)
    each_same(model.layers[-1].get_weights(), frozen)
    assert not np.array_equal(first[0], model.layers[0].get_weights()[0])


# ---------------------------------------------------------------------- tokens

TOKENS = np.where(np.arange(6) < RANDOM.integers(1, 7, size=(22, 1)), RANDOM.integers(1, 9, size=(22, 6)), 0)
TARGETS = RANDOM.normal(size=(22, 6, 1)).astype("float32")
TOKEN_WEIGHTS = RANDOM.uniform(0, 2, size=(22, 6)).astype("float32")


def tagger(optimizer, loss="mse", cls=hl.Model, masks=True):
    keras.utils.set_random_seed(0)
    parts = layers.Embedding(9, 3, mask_zero=masks), layers.Dense(1, kernel_regularizer="l2")
    return compiled(cls([keras.Input((6,), dtype="int32"), *parts]), optimizer, loss)


class ByToken(hl.Model):
    """A step with a loss that is its own mean over tokens."""

    def train_step(self, data):
        tokens, targets = data
        there = ops.cast(ops.not_equal(tokens, 0), "float32")[..., None]
        count = ops.sum(there)
        loss_fn = lambda: ops.sum(there * (self(tokens, training=True) - targets) ** 2) / count  # noqa: E731
        loss = hl.minimize(loss_fn, self, self.optimizer, weight=count)
        return {"loss": (loss * count, count)}


LOSSES = {
    "masked": ({}, {}),
    "weighted": ({"loss": MSE(reduction="mean_with_sample_weight")}, {"sample_weight": TOKEN_WEIGHTS}),
    "own mean": ({"cls": ByToken, "masks": False}, {}),
}


# Windows that do not divide the 11 steps of an epoch.
@pytest.mark.parametrize(("kind", "steps"), [("momentum", 2), ("Adam", 8)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_accumulation_weights_a_loss_by_its_tokens(loss, kind, steps):
    model, weights = LOSSES[loss]
    make = functools.partial(tagger, **model)
    trained_both_ways(OPTIMIZERS[kind], steps, (TOKENS, TARGETS), make, batch_size=2, **weights)


def test_gradient_accumulation_warns_of_losses_divided_by_different_sums():
    embedding, optimizer = layers.Embedding(4, 1, mask_zero=True), GradientAccumulation("sgd", 2)

    def loss():
        found = embedding(np.array([[1, 2, 0], [3, 0, 0]]))
        return MSE()(np.ones((2, 3, 1), "float32"), found) + MSE()(np.ones((3, 1), "float32"), ops.copy(found)[0])

    with pytest.warns(HandloomWarning, match=r"divided by different sums.*minimize\(\.\.\., weight=.*HL311"):
        hl.minimize(loss, embedding, optimizer)


# ---------------------------------------------------------------------- by hand, logged and saved


def pulling(optimizer):
    """A variable, and a compiled step that pulls it down by a value."""
    weight = keras.Variable(0.0)
    step = hl.function(lambda value: hl.minimize(lambda: weight * value, weight, optimizer))
    return weight, lambda value: step(np.float32(value))


def test_gradient_accumulation_flush_updates_from_an_incomplete_window_once():
    optimizer = GradientAccumulation(SGD(1.0), 4)
    weight, step = pulling(optimizer)
    optimizer.flush()  # The window is empty.
    for value in (1.0, 2.0):
        step(value)
    optimizer.flush()
    optimizer.flush()
    close([weight, optimizer.iterations], [-1.5, 1])


def test_gradient_accumulation_does_not_change_metrics_and_logs():
    found = []
    for optimizer in (SGD(0.0), GradientAccumulation(SGD(0.0), 3)):
        seen = []
        look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, seen=seen: seen.append(dict(logs)))
        history = fit(net(optimizer, metrics=["mae"]), X, Y, batch_size=4, epochs=2, callbacks=[look])
        found.append((history, seen))
    assert found[0] == found[1]
    assert len(found[0][1]) == 2 * 7


def test_gradient_accumulation_is_saved_with_its_window(tmp_path):
    model = net(GradientAccumulation("adam", 3))
    fit(model, X[:16], Y[:16], batch_size=4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.steps == 3
    for either in (model, loaded):
        fit(either, X, Y, batch_size=4)
    each_close(loaded.get_weights(), model.get_weights())


def test_update_every_updates_on_every_third_step(eagerly):
    optimizer = UpdateEvery(SGD(1.0), 3)
    weight, step = pulling(optimizer)
    seen = []
    for value in range(1, 8):
        step(value)
        seen.append(float(numpy(weight)))
    assert seen == [0, 0, -3, -3, -3, -9, -9]
    assert int(optimizer.iterations) == 2
