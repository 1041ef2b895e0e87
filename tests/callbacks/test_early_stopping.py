"""Stops when it gets no better, and goes back to the best."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.callbacks import EarlyStopping
from handloom.errors import HandloomWarning, StepError
from tests.callbacks.scripted import Scripted, X, run

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("script", "options", "epochs", "best"),
    [
        ([5, 4, 2, 3, 3, 1], {"patience": 2}, 5, 3),
        ([5, 4, 3, 2, 1], {"patience": 1}, 5, 5),
        ([5, 6, 4, 7], {}, 2, 1),
        ([1, 2, 3, 3, 4], {"patience": 1, "mode": "max"}, 4, 3),
        ([5, 4.5, 4, 3, 2.9, 2.8], {"patience": 1, "min_delta": 0.6}, 2, 1),
        ([5, 4.5, 4, 3, 2.9, 2.8], {"patience": 2, "min_delta": 0.6}, 6, 4),
        ([5, 4, 3, 2, 1], {"patience": 2, "baseline": 0.5}, 2, 2),
        ([5, 4, 3, 9, 9, 9], {"patience": 2, "baseline": 4.5}, 5, 3),
        ([1, 9, 8, 7, 8, 9], {"patience": 1, "start_from_epoch": 2}, 5, 4),
    ],
)
def test_it_stops_in_the_right_epoch_and_restores_the_best(script, options, epochs, best):
    model = Scripted(script)
    losses = run(model, EarlyStopping("loss", restore_best_weights=True, **options))["loss"]
    assert losses == pytest.approx(script[:epochs])
    assert float(model.count) == best


def test_without_restoring_the_last_weights_stay():
    model = Scripted([5, 4, 6, 7])
    run(model, EarlyStopping("loss", patience=1))
    assert float(model.count) == 3


@pytest.mark.parametrize(
    ("script", "epochs", "best"),
    [([NAN, 3, 2, 4, 1], 4, 3), ([3, NAN, NAN, 1], 2, 1), ([INF, 3, 4, 1], 3, 2), ([NAN, NAN, 1], 2, 1)],
)
def test_nothing_is_worse_than_nan(script, epochs, best):
    model = Scripted(script)
    stopping = EarlyStopping("loss", patience=1, restore_best_weights=True)
    assert len(run(model, stopping)["loss"]) == epochs
    assert float(model.count) == best


def test_with_more_is_better_nan_is_worse_too():
    model = Scripted([NAN, 1, 2, NAN, 3])
    run(model, EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True))
    assert float(model.count) == 3


class Reports(keras.callbacks.Callback):
    """Reports given values as `watched`, and keeps the weights of each epoch."""

    def __init__(self, values):
        super().__init__()
        self.values, self.weights = values, []

    def on_epoch_end(self, epoch, logs=None):
        logs["watched"] = self.values[epoch]
        self.weights.append(self.model.get_weights())


def assert_restored(now, best, last):
    for restored, then, later in zip(now, best, last, strict=True):
        np.testing.assert_array_equal(restored, then)
        assert not np.array_equal(restored, later)


def test_restored_weights_are_those_of_the_best_epoch_to_the_bit(eagerly):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model = hl.Model([keras.Input((3,)), layers.Dense(4, "tanh"), layers.BatchNormalization(), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    reports = Reports([5.0, 3.0, 4.0, 6.0])
    stopping = EarlyStopping("watched", mode="min", patience=2, restore_best_weights=True)
    model.fit(x, x[:, 0], epochs=9, callbacks=[reports, stopping], verbose=0)
    assert len(reports.weights) == 4
    assert_restored(model.get_weights(), reports.weights[1], reports.weights[3])
    model.fit(x, x[:, 0], verbose=0)  # And it trains on.


@pytest.mark.parametrize(("name", "values", "stops"), [("g_loss", [2, 3, 1], 2), ("accuracy", [0.5, 0.7, 0.6, 1], 3)])
def test_losses_and_metrics_need_no_mode(name, values, stops):
    class Reporting(Scripted):
        def __init__(self, script):
            super().__init__(script)
            self.accuracy = keras.metrics.BinaryAccuracy(name="accuracy")

        def train_step(self, data):
            return {name: super().train_step(data)["loss"]}

    assert len(run(Reporting(values), EarlyStopping(name))[name]) == stops


def test_a_compiled_metric_needs_no_mode():
    model = hl.Model([keras.Input((1,)), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["binary_accuracy"])
    zeros = np.zeros((4, 1), "float32")
    stopping = EarlyStopping("val_binary_accuracy", patience=1)
    history = model.fit(zeros, zeros, validation_data=(zeros, zeros), epochs=5, callbacks=[stopping], verbose=0)
    assert len(history.epoch) == 2  # It begins at its best: 1.


def test_of_a_strange_name_the_direction_must_be_said():
    class Strange(Scripted):
        def train_step(self, data):
            return {"strangeness": super().train_step(data)["loss"]}

    with pytest.raises(ValueError, match=r"EarlyStopping cannot tell .* 'strangeness' is better.*mode=\"max\""):
        run(Strange([1, 2]), EarlyStopping("strangeness"))


def test_epochs_without_validation_neither_count_nor_warn():
    x = np.zeros((4, 1), "float32")
    validations = iter([5.0, 4.0, 6.0, 7.0])
    stopping = EarlyStopping(patience=2)
    history = hl.fit(
        lambda x: {"loss": ops.mean(x)},
        x,
        epochs=12,
        validate=lambda: {"loss": next(validations)},
        validate_every=hl.every(epochs=2),
        callbacks=[stopping],
        verbose=0,
    )
    assert len(history.epoch) == 8
    assert stopping.wait == 2


def test_a_misspelt_name_warns_once():
    with pytest.warns(HandloomWarning, match=r"EarlyStopping watches 'lost_loss'.*Reported were 'loss'") as warned:
        run(Scripted([1, 2, 3]), EarlyStopping("lost_loss"))
    assert len(warned) == 1


def test_validation_that_never_comes_warns_at_the_end():
    with pytest.warns(HandloomWarning, match="watches 'val_loss', which was reported in no epoch") as warned:
        run(Scripted([1, 2, 3]), EarlyStopping())
    assert len(warned) == 1


# ------------------------------------------------------------------------ hl.fit


def test_several_models_of_a_plain_step_are_restored_together(eagerly):
    generator = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    discriminator = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    g_optimizer, d_optimizer = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)

    def step(x):
        g_loss = hl.minimize(lambda: ops.mean((generator(x) - 1) ** 2), generator, g_optimizer)
        d_loss = hl.minimize(lambda: ops.mean((discriminator(x) - 1) ** 2), discriminator, d_optimizer)
        return {"g_loss": g_loss, "d_loss": d_loss}

    reports = Reports([2.0, 1.0, 3.0])
    stopping = EarlyStopping("watched", mode="min", restore_best_weights=True)
    state = {"generator": generator, "discriminator": discriminator}
    hl.fit(step, X + 1, epochs=5, state=state, callbacks=[reports, stopping], verbose=0)
    assert len(reports.weights) == 3
    now = [*discriminator.get_weights(), *generator.get_weights()]
    assert_restored(now, reports.weights[1], reports.weights[2])


def test_without_a_model_in_the_state_the_error_says_what_to_pass():
    stopping = EarlyStopping("loss", restore_best_weights=True)
    with pytest.raises(StepError, match=r'state=\{"model": model\}'):
        hl.fit(lambda x: {"loss": ops.mean(x)}, X, callbacks=[stopping], verbose=0)


def test_stopping_alone_needs_no_model():
    script = iter([3.0, 4.0, 2.0])
    report = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(watched=next(script)))
    history = hl.fit(
        lambda x: {"x": ops.mean(x)},
        X,
        epochs=3,
        callbacks=[report, EarlyStopping("watched", mode="min")],
        verbose=0,
    )
    assert history.history["watched"] == [3, 4]


# ------------------------------------------------------------------------- state


def test_a_run_that_had_stopped_stays_stopped():
    first = EarlyStopping("loss", restore_best_weights=True)
    model = Scripted([2, 3, 9, 9])
    run(model, first)
    second = EarlyStopping("loss", restore_best_weights=True)
    state = first.state()

    class Restore(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            second.restore(state)

    model.count.assign(7)
    history = model.fit(X, epochs=4, initial_epoch=2, callbacks=[second, Restore()], verbose=0)
    assert history.epoch == []
    assert float(model.count) == 1
