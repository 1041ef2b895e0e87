"""Callbacks of Keras with `hl.Model.fit`, `evaluate` and `predict`; and how epochs and validations are counted.

That a whole run with many callbacks of Keras is the same as in Keras is row B6.
"""

import itertools

import keras
import numpy as np
import pytest

from tests.callbacks.scripted import Scripted
from tests.models import compiled, functional
from tests.models import fit as fit_model
from tests.numbers import close, each_close, same
from tests.resume.stopped import StopAt, Stopped

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = X[:, :1] + 1
hook = keras.callbacks.LambdaCallback


class Validated(Scripted):
    """Reports, in validation, the number of its steps."""

    def test_step(self, data):
        return {"steps": self.count}


def fit(model, *callbacks, **options):
    fit_model(model, X, Y, **({"batch_size": 8, "callbacks": callbacks} | options))
    return model.history


def regressor():
    return compiled(functional(), keras.optimizers.SGD(0.1, momentum=0.9))


class Events(keras.callbacks.Callback):
    """Records calls of the hooks that are named."""

    def __init__(self, *names):
        super().__init__()
        self.seen = []
        for name in names:
            setattr(self, name, lambda *args, name=name, **logs: self.seen.append((name, *args, *logs.values())))


# ----------------------------------------------------------- callbacks of Keras


def test_model_checkpoint_of_keras_saves_a_model_that_trains_on_with_its_optimizer(tmp_path):
    model = regressor()
    fit(model, keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"), epochs=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.keras", "2.keras", "3.keras"]
    loaded = keras.models.load_model(tmp_path / "2.keras")
    assert int(loaded.optimizer.iterations) == 2
    fit(loaded)
    each_close(loaded.get_weights(), model.get_weights())


def test_model_checkpoint_of_keras_saves_every_so_many_steps(tmp_path):
    model = Scripted(range(8))
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{batch}.weights.h5", save_weights_only=True, save_freq=3)
    fit(model, save, batch_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3.weights.h5", "6.weights.h5"]
    model.load_weights(tmp_path / "6.weights.h5")
    assert float(model.count) == 6


def test_terminate_on_nan_of_keras_stops_at_the_step_with_the_nan(capsys):
    model = Scripted([3, 1, np.nan, 1, 1, 1, 1, 1])
    fit(model, keras.callbacks.TerminateOnNaN(), batch_size=1, epochs=2)
    assert float(model.count) == 3
    assert np.isnan(model.history.history["loss"]).tolist() == [True]
    assert "Invalid loss" in capsys.readouterr().out


def test_backup_and_restore_of_keras_resumes_a_run_that_failed(tmp_path):
    uninterrupted, failed, resumed = regressor(), regressor(), regressor()
    failed.set_weights(uninterrupted.get_weights())
    fit(uninterrupted, epochs=4)
    with pytest.raises(Stopped):
        fit(failed, keras.callbacks.BackupAndRestore(tmp_path / "backup"), StopAt(3), epochs=4)
    assert fit(resumed, keras.callbacks.BackupAndRestore(tmp_path / "backup"), epochs=4).epoch == [2, 3]
    each_close(resumed.get_weights(), uninterrupted.get_weights())
    assert int(resumed.optimizer.iterations) == 4
    assert not (tmp_path / "backup").exists()


def test_swap_ema_weights_of_keras_validates_with_the_averages():
    model = compiled(functional(), keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9))
    history = fit(model, keras.callbacks.SwapEMAWeights(), epochs=3, validation_data=(X, Y)).history
    close(model.evaluate(X, Y, verbose=0), history["val_loss"][-1])  # The end of training puts them in place.


# ------------------------------------------------------------------------ hooks


def test_fit_gives_callbacks_the_model_and_the_parameters():
    events = Events("on_train_begin")
    model = Scripted(range(8))
    fit(model, events, batch_size=2, epochs=2)
    assert events.model is model
    assert events.params == {"epochs": 2, "steps": 4, "verbose": 0}


@pytest.mark.parametrize("name", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"])
def test_fit_keeps_weights_that_a_hook_assigns(name, eagerly):
    """Keras on JAX loses those that batch hooks assign."""
    model, pending = Scripted(range(9)), [5]
    write = keras.callbacks.Callback()
    setattr(write, name, lambda *_: model.count.assign(pending.pop()) if pending else None)
    history = fit(model, write, epochs=2).history
    assert history["loss"] == ([0, 5] if name == "on_train_batch_end" else [5, 6])
    assert float(model.count) == (6 if name == "on_train_batch_end" else 7)


def test_fit_shows_hooks_the_weights_of_the_moment():
    model, seen = regressor(), []

    def read(batch, logs):
        seen.append((int(model.optimizer.iterations), model.get_weights()[0]))

    fit(model, hook(on_train_batch_end=read), batch_size=2, epochs=2)
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(not np.array_equal(one, other) for (_, one), (_, other) in itertools.pairwise(seen))
    same(seen[-1][1], model.get_weights()[0])


def test_evaluate_and_predict_may_be_called_in_a_hook_of_fit():
    model, losses = regressor(), []

    def look(epoch, logs):
        assert model.predict(X, verbose=0).shape == (8, 1)
        losses.append(model.evaluate(X, Y, verbose=0))

    close(fit(model, hook(on_epoch_end=look), epochs=2, validation_data=(X, Y)).history["val_loss"], losses)


def test_evaluate_and_predict_call_their_hooks():
    model = regressor()
    test = ["on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end"]
    events = Events(*test)
    loss = model.evaluate(X, Y, batch_size=4, verbose=0, callbacks=[events])
    assert [name for name, *_ in events.seen] == [test[0], *test[1:3], *test[1:3], test[3]]
    assert events.seen[-1][-1] == {"loss": loss}
    predict = ["on_predict_begin", "on_predict_batch_end", "on_predict_end"]
    events = Events(*predict)
    predicted = model.predict(X, batch_size=4, verbose=0, callbacks=[events])
    assert [name for name, *_ in events.seen] == [predict[0], predict[1], *predict[1:]]
    same(events.seen[2][2]["outputs"], predicted[4:])


def test_evaluate_and_predict_stop_when_a_hook_says_so():
    model = regressor()

    class StopEarly(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            self.model.stop_evaluating = True

        def on_predict_batch_end(self, batch, logs=None):
            self.model.stop_predicting = True

    first = model.evaluate(X[:2], Y[:2], verbose=0)
    close(model.evaluate(X, Y, batch_size=2, verbose=0, callbacks=[StopEarly()]), first)
    assert len(model.predict(X, batch_size=2, verbose=0, callbacks=[StopEarly()])) == 2
    assert len(model.predict(X, batch_size=2, verbose=0)) == 8


# ----------------------------------------------------------------------- epochs


def test_fit_counts_epochs_from_the_initial_one():
    model = Scripted(range(9))
    history = fit(model, epochs=5, initial_epoch=3)
    assert history.epoch == [3, 4]
    assert history is model.history
    assert float(model.count) == 2
    assert fit(model, epochs=3, initial_epoch=3).epoch == []


@pytest.mark.parametrize(
    ("frequency", "values"), [(2, [2, 4]), (np.int64(3), [3]), ([1, 4], [1, 4]), ((3,), [3]), (6, None)]
)
def test_fit_validates_at_the_epochs_of_validation_freq(frequency, values):
    history = fit(Validated(range(9)), epochs=5, validation_data=(X, Y), validation_freq=frequency).history
    assert history.get("val_steps") == values
    assert len(history["loss"]) == 5


@pytest.mark.once
@pytest.mark.parametrize("frequency", [0, 1.5, "1", [2, 0.5]])
def test_fit_refuses_a_validation_freq_that_is_not_a_number_of_epochs(frequency):
    with pytest.raises(ValueError, match=r"fit\(validation_freq=.*HL004"):
        fit(Scripted(range(2)), validation_data=(X, Y), validation_freq=frequency)
