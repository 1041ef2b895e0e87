"""Known problems of resuming in Keras, each beside the same run here; as in `tests/test_pain.py`."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom.errors import HandloomWarning
from tests.models import compiled, functional
from tests.numbers import each_same, same
from tests.resume.stopped import StopAt, Stopped
from tests.test_pain import RATE, START, X, Y

STEPS = 10  # An epoch.


def made(base, dropout=0.5):
    """A model whose result depends on every batch, mask and order."""
    model = functional(layers.Dropout(dropout), layers.Dense(1), cls=base)
    model.set_weights([START, np.zeros(1)])
    return compiled(model, keras.optimizers.Adam(RATE))


def fit(model, *callbacks, **options):
    return model.fit(X, Y, callbacks=callbacks, **{"batch_size": 8, "epochs": 3, "verbose": 0} | options)


def steps_of(model):
    return int(model.optimizer.iterations)


class Killed(keras.callbacks.Callback):
    """Ends a run at the end of an epoch, after the callbacks before it have saved."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Stopped


# On TensorFlow, both processes happen to draw the same seed for Keras's shuffling.
@pytest.mark.parametrize(
    ("dropout", "shuffle"),
    [
        pytest.param(0.5, False, id="dropout"),
        pytest.param(0.0, True, id="shuffle", marks=pytest.mark.backend("jax", "torch")),
    ],
)
def test_fit_resumed_between_epochs_continues_random_numbers_where_keras_repeats_them(dropout, shuffle, tmp_path):
    def kernel(base, *callbacks, **options):
        keras.utils.set_random_seed(0)
        model = made(base, dropout)
        fit(model, *callbacks, shuffle=shuffle, **options)
        assert steps_of(model) == 3 * STEPS
        return model.get_weights()[0]

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Stopped):
        kernel(keras.Model, backup, Killed(1))
    assert np.abs(kernel(keras.Model, backup) - kernel(keras.Model)).max() > 0.01

    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        kernel(hl.Model, Killed(1), run_dir=run_dir)
    same(kernel(hl.Model, run_dir=run_dir), kernel(hl.Model))


def test_fit_resumed_within_an_epoch_takes_each_step_once_where_keras_repeats_some(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=4)
    with pytest.raises(Stopped):
        fit(made(keras.Model), backup, StopAt(17))
    replayed = made(keras.Model)
    fit(replayed, backup)
    assert steps_of(replayed) == 16 + 2 * STEPS

    options = {"seed": 0, "save": hl.every(steps=4)}
    with pytest.raises(Stopped):
        fit(made(hl.Model), StopAt(17), run_dir=tmp_path / "run", **options)
    whole, resumed = made(hl.Model), made(hl.Model)
    fit(whole, run_dir=tmp_path / "whole", **options)
    fit(resumed, run_dir=tmp_path / "run", **options)
    assert steps_of(resumed) == 3 * STEPS
    each_same(resumed.get_weights(), whole.get_weights())


@pytest.mark.parametrize(("base", "epochs_of_next_fit"), [(keras.Model, []), (hl.Model, [0, 1])])
def test_fit_after_a_resumed_one_trains_where_keras_does_nothing(base, epochs_of_next_fit, tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Stopped):
        fit(made(base), backup, Killed(1))
    resumed = made(base)
    assert fit(resumed, backup).epoch == [2]
    assert fit(resumed, epochs=2).epoch == epochs_of_next_fit


def test_fit_resumed_after_its_end_does_nothing_where_keras_trains_again(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    fit(made(keras.Model), backup)
    assert not (tmp_path / "backup").exists()
    with pytest.raises(Stopped):
        fit(made(keras.Model), backup, StopAt(1))

    whole, again = made(hl.Model), made(hl.Model)
    fit(whole, run_dir=tmp_path / "run")
    assert fit(again, StopAt(1), run_dir=tmp_path / "run").epoch == [0, 1, 2]
    each_same(again.get_weights(), whole.get_weights())


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_fit_resumes_despite_a_damaged_file_where_keras_fails(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=4)
    with pytest.raises(Stopped):
        fit(made(keras.Model), backup, StopAt(17))
    cut_in_half(tmp_path / "backup" / "latest.weights.h5")
    with pytest.raises(OSError, match="truncated"):
        fit(made(keras.Model), backup)

    options = {"run_dir": tmp_path / "run", "save": hl.every(steps=4)}
    with pytest.raises(Stopped):
        fit(made(hl.Model), StopAt(17), **options)
    cut_in_half(tmp_path / "run" / "checkpoints" / "step_000000016" / "arrays.safetensors")
    model = made(hl.Model)
    with pytest.warns(HandloomWarning, match="arrays.safetensors"):
        fit(model, **options)
    assert steps_of(model) == 3 * STEPS


def overflowing():
    """Makes the learning rate far too large in the second epoch."""
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e38 if epoch == 1 else rate)


def test_fit_does_not_save_weights_with_nan_where_keras_replaces_the_good_ones(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Stopped):
        fit(made(keras.Model), overflowing(), backup, Killed(1))
    resumed = made(keras.Model)
    fit(resumed, backup)
    assert np.isnan(resumed.get_weights()[0]).all()

    with pytest.warns(HandloomWarning, match=r"The state at step 20 is not saved: NaN or infinity in state\.model"):
        fit(made(hl.Model), overflowing(), run_dir=tmp_path / "run", epochs=2)
    resumed = made(hl.Model)
    fit(resumed, run_dir=tmp_path / "run")
    assert steps_of(resumed) == 3 * STEPS
    assert np.isfinite(resumed.get_weights()[0]).all()
