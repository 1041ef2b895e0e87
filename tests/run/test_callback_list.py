"""Keras's callback protocol: which hooks are called, when, and with what."""

from collections.abc import Mapping

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl

X = np.arange(6, dtype="float32")[:, None]  # In batches of 4: two steps an epoch.


def step(x):
    return {"mean": ops.mean(x)}


def run(*callbacks, data=X, **options):
    return hl.fit(step, hl.Feed(data, batch_size=4), callbacks=callbacks, verbose=0, **options)


def model():
    made = hl.Model([layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


class Diary(keras.callbacks.Callback):
    """Writes down every call of a hook."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def on_train_begin(self, logs=None):
        self.entries.append("train begins")

    def on_epoch_begin(self, epoch, logs=None):
        self.entries.append(f"epoch {epoch} begins")

    def on_train_batch_begin(self, batch, logs=None):
        self.entries.append(f"batch {batch} begins")

    def on_train_batch_end(self, batch, logs=None):
        self.entries.append(f"batch {batch} ends")

    def on_test_begin(self, logs=None):
        self.entries.append("test begins")

    def on_test_batch_begin(self, batch, logs=None):
        self.entries.append(f"test batch {batch} begins")

    def on_test_batch_end(self, batch, logs=None):
        self.entries.append(f"test batch {batch} ends")

    def on_test_end(self, logs=None):
        self.entries.append("test ends")

    def on_predict_begin(self, logs=None):
        self.entries.append("predict begins")

    def on_predict_batch_begin(self, batch, logs=None):
        self.entries.append(f"predict batch {batch} begins")

    def on_predict_batch_end(self, batch, logs=None):
        self.entries.append(f"predict batch {batch} ends")

    def on_predict_end(self, logs=None):
        self.entries.append("predict ends")

    def on_epoch_end(self, epoch, logs=None):
        self.entries.append(f"epoch {epoch} ends")

    def on_train_end(self, logs=None):
        self.entries.append("train ends")


TEST = ["test begins", "test batch 0 begins", "test batch 0 ends", "test ends"]
EPOCH = ["batch 0 begins", "batch 0 ends", "batch 1 begins", "batch 1 ends", *TEST]
TRAINING = ["train begins", "epoch 0 begins", *EPOCH, "epoch 0 ends", "epoch 1 begins", *EPOCH, "epoch 1 ends"]
TRAINING += ["train ends"]


def test_the_hooks_of_a_plain_step_are_called_in_keras_order(eagerly):
    diary = Diary()
    run(diary, epochs=2, validate=(step, X))
    assert diary.entries == TRAINING


@pytest.mark.parametrize("cls", [hl.Model, keras.Model])
def test_the_hooks_of_a_model_are_called_as_keras_calls_them(cls):
    inputs = keras.Input((1,))
    made, diary = cls(inputs, layers.Dense(1)(inputs)), Diary()
    made.compile("sgd", "mse")
    made.fit(X, X, batch_size=4, epochs=2, validation_data=(X[:3], X[:3]), callbacks=[diary], verbose=0)
    made.evaluate(X[:3], X[:3], callbacks=[diary], verbose=0)
    made.predict(X[:3], callbacks=[diary], verbose=0)
    prediction = ["predict begins", "predict batch 0 begins", "predict batch 0 ends", "predict ends"]
    assert diary.entries == [*TRAINING, *TEST, *prediction]


def test_only_what_a_callback_overrides_is_called(monkeypatch):
    def not_called(self, *args, **kwargs):
        raise AssertionError("A hook that nobody overrides was called.")

    class EpochsOnly(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1

    for hook in ("on_train_batch_begin", "on_train_batch_end", "on_epoch_begin", "on_train_begin", "on_train_end"):
        monkeypatch.setattr(keras.callbacks.Callback, hook, not_called)
    callback = EpochsOnly()
    run(callback, epochs=3)
    assert callback.epochs == 3


def test_the_older_names_of_the_batch_hooks_are_called():
    class Older(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_batch_begin(self, batch, logs=None):
            self.seen.append(f"{batch} begins")

        def on_batch_end(self, batch, logs=None):
            self.seen.append(f"{batch} ends with {logs['mean']}")

    older = Older()
    run(older)
    assert older.seen == ["0 begins", "0 ends with 1.5", "1 begins", "1 ends with 2.5"]


def test_hooks_inherited_from_a_callback_of_the_users_are_called():
    class Child(Diary):
        pass

    child = Child()
    run(child)
    assert "batch 1 ends" in child.entries


def test_callbacks_are_called_in_the_order_given():
    seen = []

    def noting(name):
        return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(f"{name}{batch}"))

    run(noting("a"), noting("b"))
    assert seen == ["a0", "b0", "a1", "b1"]


def test_a_lambda_callback_is_called_with_the_arguments_that_keras_passes():
    calls = []
    taking_two = ["on_epoch_begin", "on_epoch_end"]
    taking_two += [f"on_{phase}_batch_{when}" for phase in ("train", "test", "predict") for when in ("begin", "end")]
    taking_one = [f"on_{phase}_{when}" for phase in ("train", "test", "predict") for when in ("begin", "end")]
    hooks = {
        hook: lambda number, logs, hook=hook: calls.append((hook, isinstance(logs, Mapping))) for hook in taking_two
    }
    hooks |= {hook: lambda logs, hook=hook: calls.append((hook, isinstance(logs, Mapping))) for hook in taking_one}
    made, callback = model(), keras.callbacks.LambdaCallback(**hooks)
    made.fit(X, X, callbacks=[callback], validation_data=(X, X), verbose=0)
    made.predict(X, callbacks=[callback], verbose=0)
    assert set(calls) == {(hook, True) for hook in hooks}


def test_a_callback_list_is_taken_as_it_is():
    diary = Diary()
    callbacks = keras.callbacks.CallbackList([diary], add_history=True)
    hl.fit(step, hl.Feed(X, batch_size=4), callbacks=callbacks, verbose=0)
    assert diary.entries[0] == "train begins"
    assert diary.entries.count("batch 1 ends") == 1
    diary.entries.clear()
    model().fit(X, X, callbacks=callbacks, verbose=0)
    assert diary.entries[-1] == "train ends"


def test_one_callback_needs_no_list():
    diary = Diary()
    hl.fit(step, X, callbacks=diary, verbose=0)
    assert "train ends" in diary.entries
    diary.entries.clear()
    model().evaluate(X, X, callbacks=diary, verbose=0)
    assert diary.entries == TEST


def test_no_callbacks_may_be_none():
    hl.fit(step, X, callbacks=None, verbose=0)
    model().fit(X, X, callbacks=None, verbose=0)


@pytest.mark.parametrize("wrong", ["print", print, keras.callbacks.History], ids=["text", "function", "class"])
def test_what_is_no_callback_is_refused_before_anything_runs(wrong):
    def never(x):
        raise AssertionError("A step ran.")

    with pytest.raises(TypeError, match=r"callbacks takes keras.callbacks.Callback objects; received .*LambdaCallback"):
        hl.fit(never, X, callbacks=[Diary(), wrong], verbose=0)


def test_callbacks_know_the_model_and_the_parameters():
    made, diary = model(), Diary()
    made.fit(X, X, batch_size=4, epochs=2, callbacks=[diary], verbose=0)
    assert diary.model is made
    assert diary.params == {"epochs": 2, "steps": 2, "verbose": 0}


def test_callbacks_of_a_plain_step_find_the_model_in_its_state():
    made, diary = keras.Sequential([layers.Dense(1)]), Diary()
    run(diary, state={"optimizer": keras.optimizers.SGD(), "net": made})
    assert diary.model is made


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"])
def test_weights_written_in_a_hook_count_in_the_next_step_of_a_plain_step(hook, eagerly):
    weight = keras.Variable(1.0, trainable=False)
    written = []

    def write(*_):
        if not written:
            written.append(True)
            weight.assign(5.0)

    def add_one(x):
        before = ops.copy(weight.value)
        weight.assign(weight + 1)
        return {"before": before}

    callback = keras.callbacks.Callback()
    setattr(callback, hook, write)
    feed = hl.Feed(X[:3], batch_size=3)
    history = hl.fit(add_one, feed, epochs=2, state=weight, callbacks=[callback], verbose=0).history
    assert history["before"] == ([1, 5] if hook == "on_train_batch_end" else [5, 6])


def test_validation_by_a_function_calls_the_hooks_of_a_test_too():
    diary = Diary()
    run(diary, validate=lambda: {"loss": 1.0})
    assert diary.entries[-4:] == ["test begins", "test ends", "epoch 0 ends", "train ends"]


def test_callbacks_of_a_step_without_a_model_can_still_stop_it():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    diary = Diary()
    run(diary, Stop(), epochs=5)
    assert diary.entries == [
        "train begins",
        "epoch 0 begins",
        "batch 0 begins",
        "batch 0 ends",
        "epoch 0 ends",
        "train ends",
    ]


def test_what_an_epoch_reported_reaches_each_hook_that_asks(eagerly):
    seen = {}

    class Asks(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            seen["test end"] = dict(logs)

        def on_epoch_end(self, epoch, logs=None):
            seen["epoch end"] = dict(logs)

        def on_train_end(self, logs=None):
            seen["train end"] = dict(logs)

    run(Asks(), validate=(step, 10 * X))
    expected = {"mean": 2.5, "val_mean": 25.0}
    assert seen == {"test end": {"mean": 25.0}, "epoch end": expected, "train end": expected}


def test_what_a_callback_adds_at_the_end_of_an_epoch_is_in_the_history():
    def add(epoch, logs):
        logs["epoch_squared"] = epoch**2

    assert run(keras.callbacks.LambdaCallback(on_epoch_end=add), epochs=3).history["epoch_squared"] == [0, 1, 4]


def test_predictions_reach_the_callbacks():
    outputs = []
    keep = keras.callbacks.LambdaCallback(
        on_predict_batch_end=lambda batch, logs: outputs.append(ops.convert_to_numpy(logs["outputs"]))
    )
    predicted = model().predict(X, batch_size=4, callbacks=[keep], verbose=0)
    np.testing.assert_array_equal(np.concatenate(outputs), predicted)


class Closes(keras.callbacks.Callback):
    closed = 0

    def close(self):
        self.closed += 1


def test_a_callback_with_close_is_closed_once_at_the_end():
    callback = Closes()
    run(callback, epochs=2)
    assert callback.closed == 1


def test_a_callback_with_close_is_closed_after_an_exception_in_a_step(eagerly):
    def fails(x):
        raise RuntimeError("broken")

    callback = Closes()
    with pytest.raises(RuntimeError, match="broken"):
        hl.fit(fails, X, callbacks=[callback], verbose=0)
    assert callback.closed == 1


def test_a_callback_with_close_is_closed_after_an_exception_in_another_callback():
    def fail(epoch, logs):
        raise RuntimeError("broken")

    before, after = Closes(), Closes()
    with pytest.raises(RuntimeError, match="broken"):
        run(before, keras.callbacks.LambdaCallback(on_epoch_end=fail), after)
    assert (before.closed, after.closed) == (1, 1)


def test_a_callback_with_close_is_closed_after_evaluate_and_predict():
    callback, made = Closes(), model()
    made.evaluate(X, X, callbacks=[callback], verbose=0)
    made.predict(X, callbacks=[callback], verbose=0)
    assert callback.closed == 2


def test_an_interrupt_closes_callbacks_too():
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    callback = Closes()
    with pytest.raises(KeyboardInterrupt):
        run(callback, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    assert callback.closed == 1
