"""A run that stops and resumes ends bitwise identical to one that never stopped: a row for each kind of state."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.optimizers import GradientAccumulation, WeightAveraging
from tests.models import compiled
from tests.numbers import normal
from tests.resume import runs
from tests.resume.runs import assert_same, left
from tests.resume.stopped import StopAt, Stopped

X = normal(24, 3)
Y = X[:, :1] ** 2
BATCH = 6


class Net(hl.Model):
    """A model that is built with its first batch."""

    def __init__(self, *between):
        super().__init__()
        self.low, self.between, self.head = layers.Dense(4, "relu"), list(between), layers.Dense(1)

    def call(self, x, training=False):
        x = self.low(x)
        for layer in self.between:
            x = layer(x, training=training)
        return self.head(x)


class OwnStep(Net):
    def train_step(self, data):
        x, y = data
        x = x + 0.1 * keras.random.normal(ops.shape(x))  # From the global seed generator.
        return {"error": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2)), "rows": len(x)}


def train(
    run_dir, stop=0, *, cls=Net, between=list, optimizer=lambda: "sgd", callbacks=list, in_validation=0, **options
):
    """Trains a new model by `fit`; returns it, and the callbacks."""
    model = compiled(cls(*between()), optimizer(), metrics=["mae"])
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "save": hl.every(steps=2)} | options
    used = [*callbacks(), StopAt(stop, in_validation)]
    model.fit(X, Y, seed=1, run_dir=run_dir, verbose=0, callbacks=used, **options)
    return model, used


def trained(run_dir, **options):
    """The result of a run that ends."""
    model, callbacks = train(run_dir, **options)
    return left(run_dir, {"model": model}, model.history, callbacks)


def assert_resumes_bitwise(tmp_path, *stops, **options):
    """Stops a run at each of these, one after the other, resumes it, and compares it with one that never stopped."""
    whole = trained(tmp_path / "whole", **options)
    for stop in stops:
        with pytest.raises(Stopped):
            train(tmp_path / "run", **options, **stop)
    assert_same(trained(tmp_path / "run", **options), whole)


def momentum():
    return keras.optimizers.SGD(0.01, momentum=0.9)


def schedule():
    return keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.5))


def by_name():
    return {"head": momentum(), "*": GradientAccumulation("adam", 2)}


def plateau():
    return [hl.callbacks.ReduceLROnPlateau("loss", patience=0, factor=0.5, min_delta=10.0)]


def early_stopping():
    return [hl.callbacks.EarlyStopping("loss", patience=2, min_delta=10.0, restore_best_weights=True)]


class Draws(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["drawn"] = np.random.uniform()


# The options of a run, and where it stops. There are four steps an epoch; every second one is saved.
ROWS = {
    "dropout": ({"between": lambda: [layers.Dropout(0.5)]}, {"stop": 3}),
    "batch normalization": ({"between": lambda: [layers.BatchNormalization()]}, {"stop": 3}),
    "noise without a seed of its own": ({"cls": OwnStep}, {"stop": 3}),
    "shuffle": ({"shuffle": True}, {"stop": 3}),
    "a last batch that is smaller": ({"batch_size": 5}, {"stop": 5}),
    "momentum": ({"optimizer": momentum}, {"stop": 3}),
    "schedule": ({"optimizer": schedule}, {"stop": 7}),
    "plateau": ({"callbacks": plateau, "epochs": 4}, {"stop": 11}),
    "early stopping": ({"callbacks": early_stopping, "epochs": 5}, {"stop": 11}),
    "random numbers of NumPy": ({"callbacks": lambda: [Draws()]}, {"stop": 7}),
    "accumulated gradients, within a window": ({"optimizer": lambda: GradientAccumulation("sgd", 3)}, {"stop": 3}),
    "averaged weights": ({"optimizer": lambda: WeightAveraging("sgd")}, {"stop": 3}),
    "optimizers by name": ({"optimizer": by_name}, {"stop": 3}),
    "validation at the end of an epoch, within it": ({"validation_data": (X, Y)}, {"in_validation": 2}),
    "epochs of so many steps, within a pass": ({"steps_per_epoch": 3, "epochs": 3}, {"stop": 5}),
}


@pytest.mark.parametrize("row", ROWS)
def test_fit_resumes_bitwise_with_each_kind_of_state(row, tmp_path):
    options, stop = ROWS[row]
    assert_resumes_bitwise(tmp_path, stop, **options)


@pytest.mark.once
def test_fit_trains_differently_without_the_state_of_each_row(tmp_path):
    """Otherwise the rows would prove nothing."""
    kernel = "model.head.kernel"
    for row, (options, _) in ROWS.items():
        features = options.keys() & {"between", "cls", "shuffle", "optimizer", "callbacks"}
        if features and row not in ("averaged weights", "random numbers of NumPy"):  # These train nothing.
            without = {name: option for name, option in options.items() if name not in features}
            found, plain = trained(tmp_path / row, **options), trained(tmp_path / f"{row}, without", **without)
            assert found["variables"][kernel] != plain["variables"][kernel], row


EVERYTHING = {
    "between": lambda: [layers.BatchNormalization(), layers.Dropout(0.5)],
    "optimizer": momentum,
    "shuffle": True,
    "validation_data": (X, Y),
}


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        # Before the first save, as it is made, at the end of an epoch, after it, and at the end of the run.
        *[([{"stop": stop}], {}) for stop in (1, 2, 4, 5, 8)],
        ([{"stop": 3}, {"in_validation": 1}, {"stop": 2}], {"epochs": 3}),
    ],
)
def test_fit_resumes_bitwise_wherever_and_however_often_it_stops(stops, options, tmp_path):
    assert_resumes_bitwise(tmp_path, *stops, **EVERYTHING, **options)


def test_fit_resumes_bitwise_in_eager_execution(tmp_path):
    with hl.run_eagerly(True):
        assert_resumes_bitwise(tmp_path, {"stop": 3}, **EVERYTHING)


# Before the fourth step, in the first validation, which follows it, and after the validation of the next epoch.
@pytest.mark.parametrize(("word", "count"), [("step", 4), ("validate", 1), ("validated", 2)])
def test_hl_fit_resumes_bitwise_with_several_models_and_validation_within_epochs(word, count, tmp_path):
    def stop(told):
        words.append(told)
        if words.count(word) == count:
            raise Stopped

    words, whole = [], runs.outcome("step", tmp_path / "whole")
    with pytest.raises(Stopped):
        runs.outcome("step", tmp_path / "run", stop)
    assert_same(runs.outcome("step", tmp_path / "run"), whole)
    assert len(whole["history"][1]["val_error"]) == 3


# ----------------------------------------------------------- the end, and after it


# An optimizer with an average changes the weights at the end of a run, which is not saved.
@pytest.mark.parametrize(
    "options", [EVERYTHING, {"optimizer": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)}]
)
def test_fit_resumed_with_more_epochs_continues_bitwise(options, tmp_path):
    whole = trained(tmp_path / "whole", **options, epochs=3)
    trained(tmp_path / "run", **options, epochs=2)
    assert_same(trained(tmp_path / "run", **options, epochs=3), whole)
