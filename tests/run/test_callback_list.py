"""Keras's callback protocol: the hooks that are called, their order, and their arguments."""

import contextlib
from collections.abc import Mapping

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from tests.models import compiled, functional

X = np.arange(6, dtype="float32")[:, None]  # In batches of 4: two steps an epoch.
hook = keras.callbacks.LambdaCallback

NUMBERED = [f"on_{phase}_batch_{when}" for phase in ("train", "test", "predict") for when in ("begin", "end")]
NUMBERED += ["on_epoch_begin", "on_epoch_end"]
UNNUMBERED = [f"on_{phase}_{when}" for phase in ("train", "test", "predict") for when in ("begin", "end")]


def step(x):
    return {"mean": ops.mean(x)}


def run(*callbacks, step=step, **options):
    return hl.fit(step, hl.Feed(X, batch_size=4), callbacks=callbacks, verbose=0, **options)


def model():
    return compiled(functional(inputs=1))


def at_every_hook(record):
    """A callback that passes the name of each hook, its number if it has one, and its logs."""
    hooks = {name: lambda number, logs, name=name: record(f"{name} {number}", logs) for name in NUMBERED}
    return hook(**hooks | {name: lambda logs, name=name: record(name, logs) for name in UNNUMBERED})


def recorder(entries):
    """A callback that records every call of a hook: `epoch_end 0`."""
    return at_every_hook(lambda name, logs: entries.append(name.removeprefix("on_")))


TEST = ["test_begin", "test_batch_begin 0", "test_batch_end 0", "test_end"]
EPOCH = ["train_batch_begin 0", "train_batch_end 0", "train_batch_begin 1", "train_batch_end 1", *TEST]


def test_callbacks_are_called_in_the_order_of_keras(eagerly):
    entries = []
    run(recorder(entries), epochs=2, validate=(step, X))
    epochs = [[f"epoch_begin {epoch}", *EPOCH, f"epoch_end {epoch}"] for epoch in range(2)]
    assert entries == ["train_begin", *epochs[0], *epochs[1], "train_end"]


def test_callbacks_are_called_around_a_validation_by_a_function():
    entries = []
    run(recorder(entries), validate=lambda: {"loss": 1.0})
    assert entries[-4:] == ["test_begin", "test_end", "epoch_end 0", "train_end"]


def test_callbacks_are_not_called_at_hooks_that_they_do_not_override(monkeypatch):
    def not_called(self, *args, **kwargs):
        raise AssertionError("A hook that no callback overrides was called.")

    callback, epochs = keras.callbacks.Callback(), []
    callback.on_epoch_end = lambda epoch, logs: epochs.append(epoch)
    for name in ("on_train_batch_begin", "on_train_batch_end", "on_epoch_begin", "on_train_begin", "on_train_end"):
        monkeypatch.setattr(keras.callbacks.Callback, name, not_called)
    run(callback, epochs=3)
    assert epochs == [0, 1, 2]


def test_callbacks_are_called_by_the_older_names_of_batch_hooks_which_may_be_inherited():
    class Older(keras.callbacks.Callback):
        def on_batch_begin(self, batch, logs=None):
            seen.append(batch)

        def on_batch_end(self, batch, logs=None):
            seen.append(logs["mean"])

    class Child(Older):
        pass

    seen = []
    run(Child())
    assert seen == [0, 1.5, 1, 2.5]


def test_lambda_callback_is_called_with_the_arguments_that_keras_passes():
    calls = set()
    callback, made = at_every_hook(lambda name, logs: calls.add((name.split()[0], isinstance(logs, Mapping)))), model()
    made.fit(X, X, callbacks=[callback], validation_data=(X, X), verbose=0)
    made.predict(X, callbacks=[callback], verbose=0)
    assert calls == {(name, True) for name in NUMBERED + UNNUMBERED}


@pytest.mark.parametrize(
    "form", [lambda callback: callback, lambda callback: keras.callbacks.CallbackList([callback], add_history=True)]
)
def test_callbacks_may_be_one_callback_a_callback_list_or_none(form):
    entries = []
    callbacks = form(recorder(entries))
    hl.fit(step, hl.Feed(X, batch_size=4), callbacks=callbacks, verbose=0)
    assert entries.count("train_batch_end 1") == 1
    entries.clear()
    model().evaluate(X, X, callbacks=callbacks, verbose=0)
    assert entries == TEST
    hl.fit(step, X, callbacks=None, verbose=0)


@pytest.mark.parametrize("wrong", ["print", print, keras.callbacks.History], ids=["text", "function", "class"])
def test_callbacks_that_are_none_of_keras_are_refused_before_anything_runs(wrong):
    def never(x):
        raise AssertionError("A step ran.")

    with pytest.raises(
        TypeError,
        match=r"callbacks takes keras.callbacks.Callback objects; received .*EarlyStopping\(\).*LambdaCallback",
    ):
        run(recorder([]), wrong, step=never)


def test_callbacks_see_the_values_of_the_epoch_in_the_order_given_and_may_add_to_them(eagerly):
    seen = {}
    names = ("on_test_end", "on_epoch_end", "on_train_end")
    hooks = {name: lambda *args, name=name: seen.update({name: dict(args[-1])}) for name in names}
    add = hook(on_epoch_end=lambda epoch, logs: logs.update(added=epoch))
    history = run(hook(**hooks), add, validate=(step, 10 * X), epochs=2).history
    expected = {"mean": 2.5, "val_mean": 25.0}
    assert seen == {"on_test_end": {"mean": 25.0}, "on_epoch_end": expected, "on_train_end": expected | {"added": 1}}
    assert history["added"] == [0, 1]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["step", "callback"])
def test_callbacks_with_close_are_closed_once_at_the_end_also_after_an_exception(where, error, eagerly):
    def fail(*_):
        if error:
            raise error
        return {}

    class Closes(keras.callbacks.Callback):
        def close(self):
            closed.append(self)

    closed, before, after = [], Closes(), Closes()
    failing = hook(on_epoch_end=fail) if where == "callback" else hook()
    with pytest.raises(error) if error else contextlib.nullcontext():
        run(before, failing, after, step=fail if where == "step" else step)
    assert closed == [before, after]
    if not error:
        model().evaluate(X, X, callbacks=[before], verbose=0)
        model().predict(X, callbacks=[before], verbose=0)
        assert closed == [before, after, before, before]
