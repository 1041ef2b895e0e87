"""Keras's callbacks, unchanged, with `hl.Model.fit`, `evaluate` and `predict`; and what decides when an epoch is."""

import csv
import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = X[:, :1] + 1


class Scripted(hl.Model):
    """Reports given losses, one a step, and counts its steps in a weight."""

    def __init__(self, script):
        super().__init__()
        self.script = keras.Variable(np.array(script, dtype="float32"), trainable=False)
        self.count = self.add_weight(initializer="zeros", trainable=False, name="count")
        self.built = True
        self.compile(keras.optimizers.SGD(0.1))

    def call(self, x):
        return x

    def train_step(self, data):
        loss = ops.take(self.script, ops.cast(self.count, "int32"))
        self.count.assign(self.count + 1)
        return {"loss": loss}

    def test_step(self, data):
        return {"loss": 2 * ops.take(self.script, ops.cast(self.count, "int32") - 1), "steps": self.count}


def fit(model, callbacks=(), batch_size=8, **arguments):
    return model.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=callbacks, **arguments)


def regressor():
    model = hl.Model([keras.Input((3,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


class Events(keras.callbacks.Callback):
    """Writes down what happens."""

    def __init__(self, *names):
        super().__init__()
        self.seen = []
        for name in names:
            setattr(self, name, lambda *args, name=name, **logs: self.seen.append((name, *args, *logs.values())))


# ---------------------------------------------------------- Keras's callbacks


@pytest.mark.parametrize("restore", [False, True])
def test_early_stopping_stops_in_the_right_epoch_and_restores_the_best_weights(restore):
    model = Scripted([5, 4, 2, 3, 3, 1, 1])
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=2, restore_best_weights=restore)
    history = fit(model, [stopping], epochs=7)
    assert history.history["loss"] == [5, 4, 2, 3, 3]
    assert float(model.count) == (3 if restore else 5)
    assert fit(model, epochs=1).history["loss"] == ([3] if restore else [1])


def test_early_stopping_listens_to_validation():
    model = Scripted([5, 4, 2, 3, 3, 1])
    fit(model, [keras.callbacks.EarlyStopping("val_loss", patience=1)], epochs=6, validation_data=(X, Y))
    assert model.history.history["val_loss"] == [10, 8, 4, 6]


def test_a_checkpoint_holds_the_best_weights_alone(tmp_path):
    path = tmp_path / "best.weights.h5"
    model = Scripted([5, 2, 3, 1, 4])
    best = keras.callbacks.ModelCheckpoint(path, "loss", save_best_only=True, save_weights_only=True)
    fit(model, [best], epochs=5)
    model.load_weights(path)
    assert float(model.count) == 4


def test_a_checkpoint_is_a_model_that_trains_on_with_its_optimizer(tmp_path):
    model = regressor()
    fit(model, [keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")], epochs=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.keras", "2.keras", "3.keras"]
    loaded = keras.models.load_model(tmp_path / "2.keras")
    assert int(loaded.optimizer.iterations) == 2
    fit(loaded)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)


def test_a_checkpoint_may_be_made_every_so_many_steps(tmp_path):
    model = Scripted(range(8))
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{batch}.weights.h5", save_weights_only=True, save_freq=3)
    fit(model, [save], batch_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3.weights.h5", "6.weights.h5"]
    model.load_weights(tmp_path / "6.weights.h5")
    assert float(model.count) == 6


def test_a_schedule_of_learning_rates_takes_effect_and_is_reported():
    model = regressor()
    model.optimizer.momentum = 0.0
    weights = []
    history = fit(
        model,
        [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: [0.5, 0.0, 0.25][epoch]),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0])),
        ],
        epochs=3,
    ).history
    assert history["learning_rate"] == [0.5, 0.0, 0.25]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[1], weights[2])


def test_a_plateau_reduces_the_learning_rate():
    model = Scripted([3, 2, 2, 2, 2])
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1)
    rates = fit(model, [plateau], epochs=5).history["learning_rate"]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1, 0.05, 0.025], rtol=1e-6)


def test_a_csv_log_holds_what_the_history_does(tmp_path):
    history = fit(Scripted([3, 1]), [keras.callbacks.CSVLogger(tmp_path / "log.csv")], epochs=2, validation_data=(X, Y))
    with open(tmp_path / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for name, values in history.history.items():
        assert [float(row[name]) for row in rows] == values


def test_not_a_number_terminates_in_the_step_where_it_appears(capsys):
    model = Scripted([3, 1, np.nan, 1, 1, 1, 1, 1])
    fit(model, [keras.callbacks.TerminateOnNaN()], batch_size=1, epochs=2)
    assert float(model.count) == 3
    assert np.isnan(model.history.history["loss"]).tolist() == [True]
    assert "Invalid loss" in capsys.readouterr().out


class Stop(Exception):
    """A run that is cut off."""


def cut_off(at_epoch):
    def stop(epoch, logs):
        if epoch == at_epoch:
            raise Stop

    return keras.callbacks.LambdaCallback(on_epoch_begin=stop)


def test_backup_and_restore_goes_on_where_a_run_was_cut_off(tmp_path):
    unbroken = regressor()
    start = unbroken.get_weights()
    fit(unbroken, epochs=4)
    cut = regressor()
    cut.set_weights(start)
    with pytest.raises(Stop):
        fit(cut, [keras.callbacks.BackupAndRestore(tmp_path / "backup"), cut_off(2)], epochs=4)
    resumed = regressor()
    history = fit(resumed, [keras.callbacks.BackupAndRestore(tmp_path / "backup")], epochs=4)
    assert history.epoch == [2, 3]
    for one, other in zip(unbroken.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)
    assert int(resumed.optimizer.iterations) == 4
    assert not (tmp_path / "backup").exists()


def test_after_a_restore_the_next_fit_begins_at_its_beginning(tmp_path):
    """With Keras it silently runs no epoch at all."""
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    model = Scripted(range(9))
    fit(model, [backup], epochs=3)
    model = Scripted(range(9))
    assert fit(model, [backup], epochs=4).epoch == [3]
    assert fit(model, epochs=2).epoch == [0, 1]


def test_averaged_weights_are_swapped_in_for_validation():
    inputs = keras.Input((3,))
    model = hl.Model(inputs, layers.Dense(1)(inputs))
    model.compile(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9), "mse")
    fit(model, [keras.callbacks.SwapEMAWeights()], epochs=3, validation_data=(X, Y))
    averaged = model.history.history["val_loss"][-1]
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), averaged, rtol=1e-5)  # Swapped in at the end of it all.


# ------------------------------------------------------------------ own hooks


def test_a_callback_knows_the_model_and_the_parameters():
    events = Events("on_train_begin")
    model = Scripted(range(8))
    fit(model, [events], batch_size=2, epochs=2)
    assert events.model is model
    assert events.params == {"epochs": 2, "steps": 4, "verbose": 0}


def test_logs_of_a_batch_are_the_means_so_far_and_those_of_the_epoch_the_history():
    batches, epochs = [], []
    history = fit(
        Scripted([3, 1, 2, 6]),
        [
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: batches.append(logs["loss"]),
                on_epoch_end=lambda epoch, logs: epochs.append(dict(logs)),
            )
        ],
        batch_size=4,
        epochs=2,
        validation_data=(X, Y),
    ).history
    assert batches == [3, 2, 2, 4]
    assert epochs == [
        {"loss": 2.0, "val_loss": 2.0, "val_steps": 2.0},
        {"loss": 4.0, "val_loss": 12.0, "val_steps": 4.0},
    ]
    assert history == {name: [logs[name] for logs in epochs] for name in epochs[0]}


def test_what_a_callback_adds_to_the_logs_of_an_epoch_is_history():
    add = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(extra=10 * epoch))
    assert fit(Scripted(range(2)), [add], epochs=2).history["extra"] == [0, 10]


def test_training_stops_within_an_epoch_when_a_callback_says_so():
    model = Scripted(range(8))

    def stop(batch, logs):
        model.stop_training = batch == 2

    fit(model, [keras.callbacks.LambdaCallback(on_train_batch_end=stop)], batch_size=1, epochs=5)
    assert float(model.count) == 3
    assert model.history.epoch == [0]
    assert fit(model, batch_size=4).history["loss"] == [3.5]


def test_training_stops_after_an_epoch_when_a_callback_says_so():
    model = Scripted(range(8))

    def stop(epoch, logs):
        model.stop_training = epoch == 1

    fit(model, [keras.callbacks.LambdaCallback(on_epoch_end=stop)], epochs=5)
    assert model.history.epoch == [0, 1]


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"])
def test_weights_written_in_a_hook_stay_written(hook, eagerly):
    """Keras on JAX loses those of batch hooks."""
    model = Scripted(range(9))
    written = []

    class Write(keras.callbacks.Callback):
        def write(self, *_):
            if not written:
                written.append(True)
                self.model.count.assign(5)

    write = Write()
    setattr(write, hook, write.write)
    history = fit(model, [write], epochs=2).history
    assert history["loss"] == ([0, 5] if hook == "on_train_batch_end" else [5, 6])
    assert float(model.count) == (6 if hook == "on_train_batch_end" else 7)


def test_weights_read_in_a_hook_are_those_of_the_moment():
    model = regressor()
    numbers = []

    class Read(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            numbers.append((int(self.model.optimizer.iterations), self.model.get_weights()[0]))

    fit(model, [Read()], batch_size=2, epochs=2)
    assert [number for number, _ in numbers] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(not np.array_equal(one, other) for (_, one), (_, other) in itertools.pairwise(numbers))
    np.testing.assert_array_equal(numbers[-1][1], model.get_weights()[0])


def test_a_hook_may_evaluate_and_predict():
    model = regressor()
    losses = []

    def look(epoch, logs):
        assert model.predict(X, verbose=0).shape == (8, 1)
        losses.append(model.evaluate(X, Y, verbose=0))

    history = fit(model, [keras.callbacks.LambdaCallback(on_epoch_end=look)], epochs=2, validation_data=(X, Y)).history
    np.testing.assert_allclose(losses, history["val_loss"], rtol=1e-6)


def test_evaluate_and_predict_call_their_hooks():
    model = regressor()
    events = Events("on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end")
    loss = model.evaluate(X, Y, batch_size=4, verbose=0, callbacks=[events])
    assert [name for name, *_ in events.seen] == [
        "on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_batch_begin", "on_test_batch_end",
        "on_test_end",
    ]  # fmt: skip
    assert events.seen[-1][-1] == {"loss": loss}
    events = Events("on_predict_begin", "on_predict_batch_end", "on_predict_end")
    predicted = model.predict(X, batch_size=4, verbose=0, callbacks=[events])
    assert [name for name, *_ in events.seen] == [
        "on_predict_begin", "on_predict_batch_end", "on_predict_batch_end", "on_predict_end",
    ]  # fmt: skip
    np.testing.assert_array_equal(ops.convert_to_numpy(events.seen[2][2]["outputs"]), predicted[4:])


def test_an_evaluation_and_a_prediction_may_be_stopped():
    model = regressor()

    class StopEarly(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            self.model.stop_evaluating = True

        def on_predict_batch_end(self, batch, logs=None):
            self.model.stop_predicting = True

    first = model.evaluate(X[:2], Y[:2], verbose=0)
    np.testing.assert_allclose(model.evaluate(X, Y, batch_size=2, verbose=0, callbacks=[StopEarly()]), first, rtol=1e-6)
    assert len(model.predict(X, batch_size=2, verbose=0, callbacks=[StopEarly()])) == 2
    assert len(model.predict(X, batch_size=2, verbose=0)) == 8


# -------------------------------------------------------------- what an epoch is


def test_epochs_are_counted_from_the_initial_one():
    model = Scripted(range(9))
    history = fit(model, epochs=5, initial_epoch=3)
    assert history.epoch == [3, 4]
    assert history is model.history
    assert float(model.count) == 2
    assert fit(model, epochs=3, initial_epoch=3).epoch == []


@pytest.mark.parametrize(
    ("frequency", "values"), [(2, [2, 4]), (np.int64(3), [3]), ([1, 4], [1, 4]), ((3,), [3]), (6, None)]
)
def test_validation_runs_as_often_as_it_is_asked_to(frequency, values):
    history = fit(Scripted(range(9)), epochs=5, validation_data=(X, Y), validation_freq=frequency).history
    assert history.get("val_steps") == values
    assert len(history["loss"]) == 5


def test_validation_takes_a_number_of_steps_and_a_batch_size_of_its_own():
    events = Events("on_test_batch_end")
    data = {"validation_data": (X, Y), "validation_batch_size": 2}
    fit(Scripted(range(2)), [events], **data)
    assert len(events.seen) == 4
    fit(Scripted(range(2)), [events], **data, validation_steps=3)
    assert len(events.seen) == 7


def test_steps_per_epoch_make_an_epoch_of_any_length():
    history = fit(Scripted(range(9)), batch_size=4, epochs=2, steps_per_epoch=3)
    assert history.history["loss"] == [1, 4]
    assert history.params["steps"] == 3
