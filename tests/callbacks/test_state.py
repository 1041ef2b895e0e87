"""`callback_state` and `restore_callback`: a run that resumes equals one that never stopped."""

import keras
import numpy as np
import pytest

import handloom as hl
from handloom.callbacks import (
    CSVLogger,
    EarlyStopping,
    EpochLines,
    LearningRateScheduler,
    ProgressBar,
    ReduceLROnPlateau,
    Throughput,
    callback_state,
    restore_callback,
)
from tests.callbacks.scripted import Scripted, feed
from tests.checkpoint.common import through_a_checkpoint
from tests.numbers import numpy

LOGS = [{"loss": loss, "accuracy": 1 / loss} for loss in (5.0, 4.0, 4.5, 4.2, 3.0, 3.5)]


def fresh():
    """A model whose learning rate callbacks may set."""
    model = Scripted([0])
    model.stop_training = False
    return model


def outcome(callback, model, logs):
    """Everything that a callback can have an effect on."""
    rate = numpy(model.optimizer.learning_rate)
    return logs, rate, model.stop_training, through_a_checkpoint(callback_state(callback))


def checkpoint(path):
    options = {"save_best_only": True, "save_weights_only": True}
    return keras.callbacks.ModelCheckpoint(path / "{epoch}.weights.h5", "loss", **options)


def plateau(cls, monitor="loss", **options):
    return cls(monitor, factor=0.5, patience=1, **options)


MADE = {
    "early stopping": lambda path: EarlyStopping("loss", patience=2),
    "early stopping with weights": lambda path: EarlyStopping("loss", patience=2, restore_best_weights=True),
    "plateau": lambda path: plateau(ReduceLROnPlateau, cooldown=2),
    "plateau of more": lambda path: plateau(ReduceLROnPlateau, "accuracy", mode="max"),
    "schedule by step": lambda path: LearningRateScheduler(lambda step, rate: 1 / (1 + step), every=hl.every(steps=2)),
    "schedule by epoch": lambda path: LearningRateScheduler(lambda epoch, rate: rate / 2, every=hl.every(epochs=2)),
    "csv": lambda path: CSVLogger(path / "log.csv"),
    "csv, appending": lambda path: CSVLogger(path / "log.csv", append=True),
    "Keras's early stopping": lambda path: keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True),
    "Keras's plateau": lambda path: plateau(keras.callbacks.ReduceLROnPlateau, cooldown=2),
    "Keras's schedule": lambda path: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
    "Keras's history": lambda path: keras.callbacks.History(),
    "Keras's checkpoint of the best": checkpoint,
}


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("kind", MADE)
def test_callback_state_restored_equals_a_run_that_never_stopped(kind, cut, tmp_path):
    one, other = tmp_path / "whole", tmp_path / "halves"
    for path in (one, other):
        path.mkdir()
    model, whole = fresh(), MADE[kind](one)
    expected = outcome(whole, model, feed(whole, LOGS, model))

    model, first = fresh(), MADE[kind](other)
    logs = feed(first, LOGS[:cut], model)
    state = through_a_checkpoint(callback_state(first))
    second = MADE[kind](other)
    logs += feed(second, LOGS[cut:], model, first=cut, state=state)
    np.testing.assert_equal(outcome(second, model, logs), expected)
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())
    if kind.startswith("csv"):
        assert (other / "log.csv").read_text() == (one / "log.csv").read_text()


def test_csv_logger_restored_replaces_rows_written_after_its_state(tmp_path):
    first, second = (CSVLogger(tmp_path / "log.csv") for _ in range(2))
    feed(first, LOGS[:2], fresh())
    state = first.state()
    first.on_epoch_end(2, {"loss": 99.0, "late": 1.0})
    feed(second, LOGS[2:4], fresh(), first=2, state=state)
    rows = (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["0", "5.0"], ["1", "4.0"], ["2", "4.5"], ["3", "4.2"]]


# ------------------------------------------------------------- of any callback


class Own(keras.callbacks.Callback):
    """A callback of a user, with attributes of all kinds."""

    def __init__(self, threshold, names=("a", "b")):
        super().__init__()
        self.threshold, self.names = threshold, names
        self.count, self.best, self.label, self.done = 0, None, "none", False
        self.seen, self.by_name, self.average = [], {"x": [1, 2.5]}, np.zeros(2)
        self.single, self.pair = np.float32(0.5), (1, 2)
        self.clock, self.by_number, self.unknown = print, {1: 2}, object()


def test_callback_state_holds_the_plain_values_of_a_users_callback():
    callback = Own(3.0)
    callback.set_params({"epochs": 1})
    callback.set_model(fresh())
    assert set(callback_state(callback)) == {
        *("count", "best", "label", "done", "seen", "by_name", "by_number", "average", "single", "pair")
    }
    callback.count, callback.best, callback.label, callback.done = 7, 1.5, "good", True
    callback.seen.append(4)
    callback.average += 2
    state = through_a_checkpoint(callback_state(callback))
    callback.average += 5
    other = Own(9.0)
    restore_callback(other, state)
    assert (other.count, other.best, other.label, other.done) == (7, 1.5, "good", True)
    assert (other.seen, other.by_name, other.single, other.pair) == ([4], {"x": [1, 2.5]}, 0.5, (1, 2))
    assert (other.by_number, type(other.single)) == ({1: 2}, np.float32)
    np.testing.assert_array_equal(other.average, [2, 2])
    assert other.threshold == 9.0


def test_callback_state_shares_nothing_with_its_callback():
    one, other = Own(1), Own(1)
    state = callback_state(one)
    one.by_name["x"].append(3)
    restore_callback(other, state)
    state["by_name"]["x"].append(4)
    assert other.by_name == {"x": [1, 2.5]}


def test_callback_state_asks_a_callback_that_defines_its_state():
    class Defines(keras.callbacks.Callback):
        secret = 0

        def state(self):
            return {"kept": self.secret + 1}

        def restore(self, state):
            self.secret = state["kept"]

    callback = Defines()
    assert callback_state(callback) == {"kept": 1}
    restore_callback(callback, {"kept": 5})
    assert callback.secret == 5


def test_callback_state_leaves_out_arguments_of_base_constructors():
    class Child(keras.callbacks.EarlyStopping):
        def __init__(self, **options):
            super().__init__(**options)

    first = Child(monitor="loss", min_delta=0.5)
    feed(first, LOGS[:1], fresh())
    assert set(callback_state(first)) == {"best", "best_epoch", "best_weights", "wait", "stopped_epoch"}


@pytest.mark.parametrize("made", [ProgressBar, EpochLines, Throughput, keras.callbacks.LambdaCallback])
def test_callback_state_leaves_out_clocks_and_functions(made):
    assert callback_state(made()) == {}
