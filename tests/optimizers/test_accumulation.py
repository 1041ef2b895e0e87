"""Accumulation equals the big batch."""

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
    WeightAveraging,
    averaged_weights,
)

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(26, 4)).astype("float32")
Y = (X @ [[1.0], [-2.0], [0.5], [1.0]]).astype("float32")
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "clipped": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.5),
    "scheduled": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.5)),
}


def net(optimizer, loss="mse", regularizer=None):
    keras.utils.set_random_seed(0)
    model = hl.Model([keras.Input((4,)), layers.Dense(3, "tanh"), layers.Dense(1, kernel_regularizer=regularizer)])
    model.compile(optimizer, loss)
    return model


def same_weights(one, other):
    for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 8])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_equals_the_big_batch_the_short_last_window_included(kind, steps):
    big, small = (
        net(OPTIMIZERS[kind](), regularizer="l2"),
        net(GradientAccumulation(OPTIMIZERS[kind](), steps), regularizer="l2"),
    )
    big.fit(X, Y, batch_size=4 * steps, epochs=2, shuffle=False, verbose=0)
    small.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    same_weights(small, big)
    assert int(small.optimizer.iterations.value) == int(big.optimizer.iterations.value)


def test_op_by_op_too():
    hl.run_eagerly(True)
    big, small = net("adam"), net(GradientAccumulation("adam", 3))
    big.fit(X, Y, batch_size=12, shuffle=False, verbose=0)
    small.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    same_weights(small, big)


def test_what_is_frozen_between_two_runs_is_no_longer_moved_by_its_momentum():
    model = net(GradientAccumulation(keras.optimizers.SGD(0.02, momentum=0.9), 3))
    model.fit(X, Y, batch_size=4, verbose=0)
    model.layers[-1].trainable = False
    first, *frozen = model.layers[0].get_weights(), *model.layers[-1].get_weights()
    model.fit(X, Y, batch_size=4, verbose=0)
    for before, after in zip(frozen, model.layers[-1].get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not np.array_equal(first[0], model.layers[0].get_weights()[0])


# Of each optimizer a window that is no whole part of the 11 steps.
windows = pytest.mark.parametrize(("kind", "steps"), [("SGD", 2), ("momentum", 3), ("Adam", 8)])

SENTENCES = np.where(np.arange(6) < RANDOM.integers(1, 7, size=(22, 1)), RANDOM.integers(1, 9, size=(22, 6)), 0)
TARGETS = RANDOM.normal(size=(22, 6, 1)).astype("float32")
TOKEN_WEIGHTS = RANDOM.uniform(0, 2, size=(22, 6)).astype("float32")


def tagger(optimizer, loss="mse", base=hl.Model, masks=True):
    keras.utils.set_random_seed(0)
    model = base([keras.Input((6,), dtype="int32"), layers.Embedding(9, 3, mask_zero=masks), layers.Dense(1)])
    model.compile(optimizer, loss)
    return model


def trained_on_sentences(kind, steps, make, **options):
    """A model of whole windows and one that gathers them; the last window is shorter."""
    big, small = make(OPTIMIZERS[kind]()), make(GradientAccumulation(OPTIMIZERS[kind](), steps))
    for model, batch_size in ((big, 2 * steps), (small, 2)):
        model.fit(SENTENCES, TARGETS, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, **options)
    same_weights(small, big)


@windows
def test_a_masked_loss_counts_by_its_tokens(kind, steps):
    trained_on_sentences(kind, steps, tagger)


def test_a_masked_loss_divided_by_the_weights_of_its_tokens_counts_by_them():
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    trained_on_sentences("Adam", 3, lambda optimizer: tagger(optimizer, loss), sample_weight=TOKEN_WEIGHTS)


class ByToken(hl.Model):
    """A step whose loss is a mean over tokens, of its own making."""

    def train_step(self, data):
        tokens, targets = data
        there = ops.cast(ops.not_equal(tokens, 0), "float32")[..., None]
        count = ops.sum(there)
        loss_fn = lambda: ops.sum(there * (self(tokens, training=True) - targets) ** 2) / count  # noqa: E731
        loss = hl.minimize(loss_fn, self, self.optimizer, weight=count)
        return {"loss": (loss * count, count)}


@windows
def test_an_own_mean_over_tokens_counts_by_the_weight_that_it_names(kind, steps):
    trained_on_sentences(kind, steps, lambda optimizer: tagger(optimizer, base=ByToken, masks=False))


def test_a_loss_divided_by_its_weights_counts_by_them():
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    weights = RANDOM.uniform(0, 3, 26).astype("float32")
    big, small = net(keras.optimizers.SGD(0.05), loss), net(GradientAccumulation(keras.optimizers.SGD(0.05), 7), loss)
    big.fit(X, Y, sample_weight=weights, batch_size=28, shuffle=False, verbose=0)
    small.fit(X, Y, sample_weight=weights, batch_size=4, shuffle=False, verbose=0)
    same_weights(small, big)


def test_a_sum_is_not_divided():
    loss = keras.losses.MeanSquaredError(reduction="sum")
    big, small = net(keras.optimizers.SGD(0.01), loss), net(GradientAccumulation(keras.optimizers.SGD(0.01), 7), loss)
    big.fit(X, Y, batch_size=28, shuffle=False, verbose=0)
    small.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    same_weights(small, big)


def test_a_step_may_say_what_its_loss_was_divided_by():
    weight = keras.Variable(1.0)
    optimizer = GradientAccumulation(keras.optimizers.SGD(1.0), 2)

    @hl.function
    def step(value, count):
        return hl.minimize(lambda: weight * value, weight, optimizer, weight=count)

    step(np.float32(1.0), np.float32(3.0))
    assert float(ops.convert_to_numpy(weight.value)) == 1
    step(np.float32(5.0), np.float32(1.0))
    assert float(ops.convert_to_numpy(weight.value)) == 1 - (3 * 1 + 1 * 5) / 4


def test_in_a_loop_of_ones_own_a_window_is_flushed_by_hand():
    weight = keras.Variable(1.0)
    optimizer = GradientAccumulation(keras.optimizers.SGD(1.0), 4)
    step = hl.function(lambda value: hl.minimize(lambda: weight * value, weight, optimizer))
    optimizer.flush()  # Nothing is gathered yet.
    for value in (1.0, 2.0):
        step(np.float32(value))
    optimizer.flush()
    optimizer.flush()
    assert float(ops.convert_to_numpy(weight.value)) == 1 - 1.5
    assert int(optimizer.iterations.value) == 1


def test_transforms_inside_see_whole_updates():
    clipped = GradientTransforms(keras.optimizers.SGD(1.0), [ClipByGlobalNorm(0.1)])
    big, small = (
        net(clipped),
        net(GradientAccumulation(GradientTransforms(keras.optimizers.SGD(1.0), [ClipByGlobalNorm(0.1)]), 7)),
    )
    big.fit(X, Y, batch_size=28, shuffle=False, verbose=0)
    small.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    same_weights(small, big)


def test_averages_count_updates_not_steps():
    big, small = net(WeightAveraging("sgd", 0.5)), net(GradientAccumulation(WeightAveraging("sgd", 0.5), 2))
    big.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    small.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    assert int(small.optimizer.inner_optimizer.contributions.value) == 4
    averages = [model.evaluate(X, Y, weights="ema", verbose=0) for model in (big, small)]
    np.testing.assert_allclose(averages[0], averages[1], rtol=1e-5)


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 2), (None, 3), (0.5, 8)])
def test_averaged_weights_equal_those_of_the_big_batch(decay, steps):
    momentum = lambda: WeightAveraging(keras.optimizers.SGD(0.02, momentum=0.9), decay)  # noqa: E731
    big, small = net(momentum()), net(GradientAccumulation(momentum(), steps))
    for model, batch_size in ((big, 4 * steps), (small, 4)):
        model.fit(X, Y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    with averaged_weights(big), averaged_weights(small):
        same_weights(small, big)


def test_metrics_and_logs_of_batches_are_those_without_it():
    class EachBatch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append(dict(logs))

    found = []
    for optimizer in (keras.optimizers.SGD(0.0), GradientAccumulation(keras.optimizers.SGD(0.0), 3)):
        model, each = net(optimizer), EachBatch()
        model.compile(optimizer, "mse", metrics=["mae"])
        history = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, callbacks=[each], verbose=0).history
        found.append((history, each.seen))
    assert found[0] == found[1]
    assert len(found[0][1]) == 2 * 7


def test_averages_around_it_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"put it inside: GradientAccumulation\(WeightAveraging\(optimizer\), steps\)"):
        WeightAveraging(GradientAccumulation("sgd", 2))


def test_it_is_saved_and_goes_on(tmp_path):
    model = net(GradientAccumulation("adam", 3))
    model.fit(X[:16], Y[:16], batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.steps == 3
    for either in (model, loaded):
        either.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    same_weights(loaded, model)


def test_losses_divided_by_different_sums_are_told():
    tokens = np.array([[1, 2, 0], [3, 0, 0]])
    embedding, optimizer = layers.Embedding(4, 1, mask_zero=True), GradientAccumulation("sgd", 2)
    mse = keras.losses.MeanSquaredError()

    def loss():
        found = embedding(tokens)
        return mse(np.ones((2, 3, 1), "float32"), found) + mse(np.ones((3, 1), "float32"), ops.copy(found)[0])

    with pytest.warns(HandloomWarning, match=r"divided by different sums.*minimize\(\.\.\., weight="):
        hl.minimize(loss, embedding, optimizer)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "2"])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(
        ValueError, match=r"GradientAccumulation takes a whole number, at least 1, as steps; received steps="
    ):
        GradientAccumulation("sgd", steps)
