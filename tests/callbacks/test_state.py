"""What callbacks carry, taken and given back: going on equals never having stopped."""

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

LOGS = [{"loss": loss, "accuracy": 1 / loss} for loss in (5.0, 4.0, 4.5, 4.2, 3.0, 3.5)]


def fresh():
    """A model whose weight goes up by one an epoch, and whose rate callbacks may set."""
    model = Scripted([0])
    model.stop_training = False
    return model


def outcome(callback, model, logs):
    """All that a callback can have an effect on."""
    rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    return logs, rate, model.stop_training, through_a_checkpoint(callback_state(callback))


MADE = {
    "early stopping": lambda path: EarlyStopping("loss", patience=2),
    "early stopping with weights": lambda path: EarlyStopping("loss", patience=2, restore_best_weights=True),
    "plateau": lambda path: ReduceLROnPlateau("loss", factor=0.5, patience=1, cooldown=2),
    "plateau of more": lambda path: ReduceLROnPlateau("accuracy", factor=0.5, patience=1, mode="max"),
    "schedule by step": lambda path: LearningRateScheduler(lambda step, rate: 1 / (1 + step), every=hl.every(steps=2)),
    "schedule by epoch": lambda path: LearningRateScheduler(lambda epoch, rate: rate / 2, every=hl.every(epochs=2)),
    "csv": lambda path: CSVLogger(path / "log.csv"),
    "csv, appending": lambda path: CSVLogger(path / "log.csv", append=True),
    "Keras's early stopping": lambda path: keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True),
    "Keras's plateau": lambda path: keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, cooldown=2),
    "Keras's schedule": lambda path: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
}


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("kind", MADE)
def test_going_on_equals_never_having_stopped(kind, cut, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    model, whole = fresh(), MADE[kind](tmp_path / "whole")
    expected = outcome(whole, model, feed(whole, LOGS, model))

    model, first = fresh(), MADE[kind](tmp_path / "halves")
    logs = feed(first, LOGS[:cut], model)
    state = through_a_checkpoint(callback_state(first))
    second = MADE[kind](tmp_path / "halves")
    logs += feed(second, LOGS[cut:], model, first=cut, state=state)
    np.testing.assert_equal(outcome(second, model, logs), expected)
    for callback in (whole, first, second):
        getattr(callback, "close", lambda: None)()
    if (tmp_path / "whole" / "log.csv").exists():
        assert (tmp_path / "halves" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_the_best_weights_survive():
    stopping, model = EarlyStopping("loss", patience=9, restore_best_weights=True), fresh()
    model.count.assign(3)
    feed(stopping, LOGS[:2], model)
    state = through_a_checkpoint(stopping.state())
    model.count.assign(8)
    again = EarlyStopping("loss", patience=9, restore_best_weights=True)
    feed(again, [{"loss": 7.0}], model, first=2, state=state)
    again.on_train_end({})
    assert float(model.count) == 3


def test_a_checkpoint_of_the_best_remembers_the_best(tmp_path):
    def checkpoint():
        return keras.callbacks.ModelCheckpoint(
            tmp_path / "{epoch}.weights.h5", "loss", save_best_only=True, save_weights_only=True
        )

    first, model = checkpoint(), fresh()
    feed(first, LOGS[:3], model)
    second = checkpoint()
    feed(second, LOGS[3:], model, first=3, state=through_a_checkpoint(callback_state(first)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.weights.h5", "2.weights.h5", "5.weights.h5"]


def test_a_row_written_after_the_state_was_taken_is_written_again_not_twice(tmp_path):
    first = CSVLogger(tmp_path / "log.csv")
    feed(first, LOGS[:2], fresh())
    state = first.state()
    first.on_epoch_end(2, {"loss": 99.0, "late": 1.0})
    first.close()
    second = CSVLogger(tmp_path / "log.csv")
    feed(second, LOGS[2:4], fresh(), first=2, state=state)
    second.close()
    rows = (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["0", "5.0"], ["1", "4.0"], ["2", "4.5"], ["3", "4.2"]]


# ------------------------------------------------------------- of any callback


class Own(keras.callbacks.Callback):
    """A user's, with some of everything."""

    def __init__(self, threshold, names=("a", "b")):
        super().__init__()
        self.threshold, self.names = threshold, names
        self.count, self.best, self.label, self.done = 0, None, "none", False
        self.seen, self.by_name, self.average = [], {"x": [1, 2.5]}, np.zeros(2)
        self.single, self.pair = np.float32(0.5), (1, 2)
        self.clock, self.by_number, self.unknown = print, {1: 2}, object()


def test_of_a_users_callback_the_plain_values_are_kept():
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


def test_state_and_callback_share_nothing():
    one, other = Own(1), Own(1)
    state = callback_state(one)
    one.by_name["x"].append(3)
    restore_callback(other, state)
    state["by_name"]["x"].append(4)
    assert other.by_name == {"x": [1, 2.5]}


def test_a_callback_that_knows_its_state_is_asked():
    class Knows(keras.callbacks.Callback):
        secret = 0

        def state(self):
            return {"kept": self.secret + 1}

        def restore(self, state):
            self.secret = state["kept"]

    callback = Knows()
    assert callback_state(callback) == {"kept": 1}
    restore_callback(callback, {"kept": 5})
    assert callback.secret == 5


def test_arguments_handed_on_to_keras_are_not_state():
    class Child(keras.callbacks.EarlyStopping):
        def __init__(self, **options):
            super().__init__(**options)

    first, model = Child(monitor="loss", min_delta=0.5), fresh()
    feed(first, LOGS[:1], model)
    assert set(callback_state(first)) == {"best", "best_epoch", "best_weights", "wait", "stopped_epoch"}


def test_a_lambda_callback_and_a_history_have_theirs():
    assert callback_state(keras.callbacks.LambdaCallback(on_epoch_end=print)) == {}
    history = keras.callbacks.History()
    feed(history, LOGS[:2], fresh())
    again = keras.callbacks.History()
    feed(again, LOGS[2:], fresh(), first=2, state=through_a_checkpoint(callback_state(history)))
    assert again.epoch == [0, 1, 2, 3, 4, 5]
    assert again.history["loss"] == [logs["loss"] for logs in LOGS]


@pytest.mark.parametrize("display", [ProgressBar, EpochLines, Throughput])
def test_clocks_are_not_state(display):
    assert callback_state(display()) == {}
