"""Runs that are resumed after a callback has frozen or unfrozen a layer."""

import keras
import pytest
from keras import layers

import handloom as hl
from handloom.optimizers import GradientAccumulation, WeightAveraging
from tests.numbers import normal, same_values

X, Y = normal(8, 3), normal(8, 1, seed=1)

OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "by name": lambda: {"base": keras.optimizers.SGD(0.1, momentum=0.9), "*": "adam"},
    "wrapped": lambda: GradientAccumulation(WeightAveraging(keras.optimizers.SGD(0.1)), 2),
}


class Tuned(hl.Model):
    def __init__(self):
        super().__init__()
        self.base, self.head = layers.Dense(4, trainable=False), layers.Dense(1)

    def call(self, x):
        return self.head(self.base(x))


class Unfreezing(keras.callbacks.Callback):
    """Changes the layer once, at the begin of some epochs, and stops the process at the end of one."""

    def __init__(self, stop=None):
        super().__init__()
        self.stop = stop

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in (1, 3):
            self.model.base.trainable = epoch == 1

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.stop:
            raise KeyboardInterrupt


def run(optimizer, stop=None, run_dir=None):
    keras.utils.set_random_seed(1)
    model = Tuned()
    model.compile(OPTIMIZERS[optimizer](), loss="mse")
    options = {"epochs": 5, "batch_size": 4, "verbose": 0, "run_dir": run_dir}
    if stop is None:
        model.fit(X, Y, callbacks=[Unfreezing()], **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            model.fit(X, Y, callbacks=[Unfreezing(stop)], **options)
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [2, 4], ids=["unfrozen", "frozen again"])
def test_fit_resumes_what_a_callback_has_unfrozen_bitwise(optimizer, stop, tmp_path):
    whole = run(optimizer)
    run(optimizer, stop, tmp_path)
    resumed = run(optimizer, run_dir=tmp_path)
    assert resumed.base.trainable == whole.base.trainable
    same_values(resumed, whole)
    same_values(resumed.optimizer, whole.optimizer)


def test_fit_heeds_what_the_user_has_unfrozen_before_a_run_is_resumed(tmp_path):
    run("Adam", 0, tmp_path)
    model = Tuned()
    model.compile(OPTIMIZERS["Adam"](), loss="mse")
    model.base.trainable = True
    model.fit(X, Y, epochs=1, batch_size=4, verbose=0, run_dir=tmp_path, allow=["state.model.optimizer.*"])
    assert model.base.trainable
