"""What goes wrong when a run of plain Keras is stopped and goes on, beside the same run here.

Each test shows Keras's figure too, as in `tests/test_pain.py`.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning
from tests.resume.stopped import StopAt, Stopped
from tests.test_pain import RATE, START, X, Y

STEPS = 10  # An epoch.


def made(base, dropout=0.5):
    """A model whose every batch, mask and order counts."""
    inputs = keras.Input((3,))
    model = base(inputs, layers.Dense(1)(layers.Dropout(dropout)(inputs)))
    model.set_weights([START, np.zeros(1)])
    model.compile(keras.optimizers.Adam(RATE), loss="mse")
    return model


def fit(model, *callbacks, **options):
    return model.fit(X, Y, callbacks=callbacks, **{"batch_size": 8, "epochs": 3, "verbose": 0} | options)


def steps_of(model):
    return int(model.optimizer.iterations)


class Killed(keras.callbacks.Callback):
    """Ends a run when an epoch has ended, and what was to be saved then is."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Stopped


# On TensorFlow Keras shuffles by a seed that both processes happen to draw alike.
@pytest.mark.parametrize(
    ("dropout", "shuffle"),
    [
        pytest.param(0.5, False, id="dropout"),
        pytest.param(0.0, True, id="shuffle", marks=pytest.mark.backend("jax", "torch")),
    ],
)
def test_a_run_stopped_between_epochs_draws_on_where_keras_draws_the_same_again(dropout, shuffle, tmp_path):
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
    np.testing.assert_array_equal(kernel(hl.Model, run_dir=run_dir), kernel(hl.Model))


def test_a_run_stopped_within_an_epoch_takes_each_step_once_where_keras_replays_some(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=4)
    with pytest.raises(Stopped):
        fit(made(keras.Model), backup, StopAt(17))
    replayed = made(keras.Model)
    fit(replayed, backup)
    assert steps_of(replayed) == 16 + 2 * STEPS

    options = {"seed": 0, "save": hl.every(steps=4)}
    with pytest.raises(Stopped):
        fit(made(hl.Model), StopAt(17), run_dir=tmp_path / "run", **options)
    whole, gone_on = made(hl.Model), made(hl.Model)
    fit(whole, run_dir=tmp_path / "whole", **options)
    fit(gone_on, run_dir=tmp_path / "run", **options)
    assert steps_of(gone_on) == 3 * STEPS
    for weight, expected in zip(gone_on.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize(("base", "epochs_of_next_fit"), [(keras.Model, []), (hl.Model, [0, 1])])
def test_the_fit_after_a_resumed_one_trains_where_keras_does_nothing(base, epochs_of_next_fit, tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Stopped):
        fit(made(base), backup, Killed(1))
    resumed = made(base)
    assert fit(resumed, backup).epoch == [2]
    assert fit(resumed, epochs=2).epoch == epochs_of_next_fit


def test_a_run_that_has_ended_stays_so_where_keras_has_deleted_it_and_trains_anew(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    fit(made(keras.Model), backup)
    assert not (tmp_path / "backup").exists()
    with pytest.raises(Stopped):
        fit(made(keras.Model), backup, StopAt(1))

    whole, again = made(hl.Model), made(hl.Model)
    fit(whole, run_dir=tmp_path / "run")
    assert fit(again, StopAt(1), run_dir=tmp_path / "run").epoch == [0, 1, 2]
    np.testing.assert_array_equal(again.get_weights()[0], whole.get_weights()[0])


def test_a_seed_goes_on_where_that_of_a_keras_file_is_another(tmp_path):
    def seed(model):
        return ops.convert_to_numpy(model.layers[1].seed_generator.state.value).tolist()

    model, other = made(keras.Model), made(keras.Model)
    fit(model)
    model.save(tmp_path / "model.keras")
    assert seed(keras.saving.load_model(tmp_path / "model.keras")) != seed(model)

    with hl.Checkpointer(tmp_path / "checkpoints", {"model": model}) as checkpointer:
        checkpointer.save(steps_of(model))
    assert seed(other) != seed(model)
    other.optimizer.build(other.trainable_variables)
    hl.Checkpointer(tmp_path / "checkpoints", {"model": other}).restore()
    assert seed(other) == seed(model)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_file_costs_some_steps_where_keras_cannot_go_on(tmp_path):
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
    """A learning rate that is far too large in the second epoch."""
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e38 if epoch == 1 else rate)


def test_weights_that_are_nan_are_not_saved_where_keras_puts_them_in_the_place_of_the_good_ones(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(Stopped):
        fit(made(keras.Model), overflowing(), backup, Killed(1))
    gone_on = made(keras.Model)
    fit(gone_on, backup)
    assert np.isnan(gone_on.get_weights()[0]).all()

    with pytest.warns(HandloomWarning, match=r"The state at step 20 is not saved: NaN or infinity in state\.model"):
        fit(made(hl.Model), overflowing(), run_dir=tmp_path / "run", epochs=2)
    gone_on = made(hl.Model)
    fit(gone_on, run_dir=tmp_path / "run")
    assert steps_of(gone_on) == 3 * STEPS
    assert np.isfinite(gone_on.get_weights()[0]).all()
