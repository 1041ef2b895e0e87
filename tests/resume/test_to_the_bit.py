"""A run that was stopped ends with the same bits as one that never was: a row for each thing that has a state."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.optimizers import GradientAccumulation, WeightAveraging
from tests.resume import runs
from tests.resume.runs import bits, left
from tests.resume.stopped import StopAt, Stopped

numbers = np.random.default_rng(0)
X = numbers.normal(size=(24, 3)).astype("float32")
Y = X[:, :1] ** 2
BATCH, STEPS = 6, 4


class Net(hl.Model):
    """Not built at first."""

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
    """Trains a new model, on new parts, by `fit`; returns it, and the callbacks."""
    model = cls(*between())
    model.compile(optimizer(), loss="mse", metrics=["mae"])
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "save": hl.every(steps=2)} | options
    used = [*callbacks(), StopAt(stop, in_validation)]
    model.fit(X, Y, seed=1, run_dir=run_dir, verbose=0, callbacks=used, **options)
    return model, used


def trained(run_dir, **options):
    """All that is left of a run that was trained to its end."""
    model, callbacks = train(run_dir, **options)
    return left(run_dir, {"model": model}, model.history, callbacks)


def assert_same(found, expected):
    for part, of_one in expected.items():
        assert found[part] == of_one, part


def assert_goes_on_to_the_same_bits(tmp_path, *stops, **options):
    """A run that is stopped at each of these, one after the other, however far it came before."""
    whole = trained(tmp_path / "whole", **options)
    for stop in stops:
        with pytest.raises(Stopped):
            train(tmp_path / "run", **options, **stop)
    assert_same(trained(tmp_path / "run", **options), whole)


# -------------------------------------------------------------------- to the bit


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


# What a run has, and where it is stopped: four steps an epoch, a save after each second one.
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
    "gathered gradients, within a window": ({"optimizer": lambda: GradientAccumulation("sgd", 3)}, {"stop": 3}),
    "averaged weights": ({"optimizer": lambda: WeightAveraging("sgd")}, {"stop": 3}),
    "optimizers by name": ({"optimizer": by_name}, {"stop": 3}),
    "validation at the end of an epoch, within it": ({"validation_data": (X, Y)}, {"in_validation": 2}),
    "epochs of so many steps, within a pass": ({"steps_per_epoch": 3, "epochs": 3}, {"stop": 5}),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_stopped_run_ends_with_the_same_bits(row, tmp_path):
    options, stop = ROWS[row]
    assert_goes_on_to_the_same_bits(tmp_path, stop, **options)


@pytest.mark.once
def test_what_the_rows_have_makes_a_difference(tmp_path):
    """Else its state would not matter."""
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


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 8])
def test_it_may_be_stopped_anywhere(stop, tmp_path):
    """Before the first save, as it is made, at the end of an epoch, after it, at the end of the run."""
    assert_goes_on_to_the_same_bits(tmp_path, {"stop": stop}, **EVERYTHING)


def test_it_may_be_stopped_twice_and_thrice(tmp_path):
    stops = [{"stop": 3}, {"in_validation": 1}, {"stop": 2}]
    assert_goes_on_to_the_same_bits(tmp_path, *stops, **EVERYTHING, epochs=3)


def test_op_by_op_too(tmp_path):
    with hl.run_eagerly(True):
        assert_goes_on_to_the_same_bits(tmp_path, {"stop": 3}, **EVERYTHING)


# Before the fourth step, in the first validation, which comes after it, and after that of the next epoch.
@pytest.mark.parametrize(("word", "count"), [("step", 4), ("validate", 1), ("validated", 2)])
def test_several_models_and_optimizers_in_hl_fit_validated_within_epochs(word, count, tmp_path):
    def stop(told):
        words.append(told)
        if words.count(word) == count:
            raise Stopped

    words, whole = [], runs.outcome("step", tmp_path / "whole")
    with pytest.raises(Stopped):
        runs.outcome("step", tmp_path / "run", stop)
    assert_same(runs.outcome("step", tmp_path / "run"), whole)
    assert len(whole["history"][1]["val_error"]) == 3


def test_a_loop_by_hand_goes_on_too(tmp_path):
    def run(directory, stops_at=0):
        keras.utils.set_random_seed(1)
        model, optimizer = keras.Sequential([layers.Dense(4), layers.Dropout(0.5), layers.Dense(1)]), momentum()
        error, feed = keras.metrics.MeanSquaredError(), hl.Feed((X, Y), batch_size=BATCH, shuffle=True)
        model.build((None, 3))
        optimizer.build(model.trainable_variables)

        @hl.function
        def train_step(x, y):
            loss = hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)
            error.update_state(y, model(x))
            return loss

        state = {"model": model, "optimizer": optimizer, "error": error, "feed": feed}
        with hl.Checkpointer(directory, state) as checkpointer:
            taken = checkpointer.restore() or 0
            while taken < 3 * STEPS:
                for batch in feed:
                    train_step(*batch)
                    taken += 1
                    if taken % 3 == 0:
                        checkpointer.save(taken)
                    if taken == stops_at:
                        raise Stopped
        return feed.state(), [bits(variable.value) for part in (model, optimizer, error) for variable in part.variables]

    whole = run(tmp_path / "whole")
    for stop in (5, 10):
        with pytest.raises(Stopped):
            run(tmp_path / "run", stop)
    assert run(tmp_path / "run") == whole


# ----------------------------------------------------------- the end, and after it


def test_after_the_end_nothing_runs(tmp_path):
    whole = trained(tmp_path, **EVERYTHING)
    assert_same(trained(tmp_path, **EVERYTHING, stop=1, in_validation=1), whole)  # At the first, that is.


def test_more_epochs_go_on(tmp_path):
    whole = trained(tmp_path / "whole", **EVERYTHING, epochs=4)
    trained(tmp_path / "run", **EVERYTHING, epochs=2)
    assert_same(trained(tmp_path / "run", **EVERYTHING, epochs=4), whole)


def test_what_keras_does_to_weights_at_the_end_is_not_saved(tmp_path):
    options = {"optimizer": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)}
    whole = trained(tmp_path / "whole", epochs=3, **options)
    trained(tmp_path / "run", epochs=2, **options)
    assert_same(trained(tmp_path / "run", epochs=3, **options), whole)
