"""A run is saved now and then, and goes on where it was stopped; that this is to the bit is in `tests/resume`."""

import contextlib
import errno
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.errors import CheckpointError, HandloomWarning, StepError
from tests.checkpoint.common import Nth, install
from tests.resume.stopped import StopAt, Stopped
from tests.run.run_log import epochs_in, saves_in

numbers = np.random.default_rng(0)
X = numbers.normal(size=(26, 3)).astype("float32")
Y = X[:, :1] ** 2
EVERY_STEP = hl.every(steps=1)
BATCH, STEPS = 6, 5  # The last batch of an epoch is a smaller one.


class Net(hl.Model):
    """Unbuilt at first; with everything that has a state."""

    def __init__(self):
        super().__init__()
        self.low, self.norm, self.drop, self.head = (
            layers.Dense(4, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(1),
        )

    def call(self, x, training=False):
        return self.head(self.drop(self.norm(self.low(x), training=training), training=training))


class Noisy(Net):
    """Draws random numbers in validation too, of its own and of Keras's; counts what it has validated."""

    def __init__(self):
        super().__init__()
        self.seed, self.validated = keras.random.SeedGenerator(5), keras.Variable(0, dtype="int32", trainable=False)

    def test_step(self, data):
        x, y = data
        self.validated.assign(self.validated + 1)
        x = x + keras.random.normal(ops.shape(x), seed=self.seed) + keras.random.normal(ops.shape(x))
        return super().test_step((x, y))


class BestInTheSecondEpoch(Net):
    """By what it says in validation."""

    def __init__(self):
        super().__init__()
        self.validated = keras.Variable(0.0, trainable=False)

    def test_step(self, data):
        self.validated.assign_add(1.0)
        return {"loss": ops.abs(self.validated - 1.5 * STEPS)}


class Larger(Net):
    def __init__(self):
        super().__init__()
        self.extra = layers.Dense(4)

    def call(self, x, training=False):
        return super().call(self.extra(x), training)


def momentum():
    return keras.optimizers.SGD(0.01, momentum=0.9)


class SignalInValidation(keras.callbacks.Callback):
    """Asks the run to stop, in its `count`-th validation."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def on_test_begin(self, logs=None):
        self.count -= 1

    def on_test_batch_end(self, batch, logs=None):
        if self.count == 0 and batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(run_dir, stop=0, *, cls=Net, epochs=3, together=1, **options):
    model = cls()
    model.compile(momentum(), loss="mse", metrics=["mae"], steps_per_execution=together)
    options = {"save": hl.every(steps=2), "validation_data": (X, Y)} | options
    callbacks = [StopAt(stop), *options.pop("callbacks", [])]
    try:
        model.fit(
            X, Y, batch_size=BATCH, epochs=epochs, seed=1, run_dir=run_dir, verbose=0, callbacks=callbacks, **options
        )
    except Stopped:
        return model
    return model


def bits(model):
    variables = named({"model": model})[0]
    return {name: ops.convert_to_numpy(variable.value) for name, variable in variables.items()}


def assert_same_bits(model, other):
    assert model.history.history == other.history.history
    assert model.history.epoch == other.history.epoch
    one, two = bits(model), bits(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


def stopped_and_gone_on(tmp_path, *stops, **options):
    for stop in stops:
        train(tmp_path / "run", stop, **options)
    return train(tmp_path / "run", **options)


# -------------------------------------------------------------------- to the bit


def test_steps_in_one_dispatch_are_grouped_alike_after_a_stop(tmp_path):
    options = {"together": 2, "save": hl.every(steps=4), "epochs": 2}
    whole = train(tmp_path / "whole", **options)  # In groups of 2, 2, 1 an epoch.
    for stop in (1, 2, 3, 5):
        train(tmp_path / str(stop), stop, **options)
        assert_same_bits(train(tmp_path / str(stop), **options), whole)


@pytest.mark.parametrize("validation", [1, 2], ids=["the first", "the second"])
def test_a_signal_in_a_validation_at_the_end_of_an_epoch_breaks_it_off_and_it_is_done_again(validation, tmp_path):
    options = {"cls": Noisy, "epochs": 2, "validation_batch_size": 6, "save": hl.every(epochs=5)}
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", callbacks=[SignalInValidation(validation)], **options)
    assert ended.value.code == 128 + signal.SIGTERM
    assert hl.Checkpointer(tmp_path / "run" / "checkpoints", {}).steps == [validation * STEPS]
    assert_same_bits(train(tmp_path / "run", **options), whole)
    assert [line["epoch"] for line in epochs_in(tmp_path / "run")] == [1, 2]


def test_a_signal_in_a_validation_within_an_epoch_too(tmp_path):
    def run(run_dir, *callbacks):
        keras.utils.set_random_seed(0)
        model, optimizer = keras.Sequential([layers.Dense(1)]), keras.optimizers.Adam(0.05)
        seed, error = keras.random.SeedGenerator(1), keras.metrics.MeanSquaredError()

        def step(x, y):
            error.update_state(y, model(x))
            loss = hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)
            return {"loss": loss, "error": error}

        def test_step(x, y):
            noise = keras.random.normal(ops.shape(x), seed=seed) + keras.random.normal(ops.shape(x))
            error.update_state(y, model(x + noise))  # What training has gathered in it stays.
            return {"error": error}

        return hl.fit(
            step,
            hl.Feed((X, Y), batch_size=BATCH, shuffle=True),
            state={"model": model, "optimizer": optimizer, "seed": seed, "error": error},
            epochs=2,
            run_dir=run_dir,
            validate=(test_step, hl.Feed((X, Y), batch_size=BATCH, shuffle=True)),
            validate_every=hl.every(steps=3),
            callbacks=callbacks,
            verbose=0,
        ).history

    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run(tmp_path / "run", SignalInValidation(2))  # After six steps of ten.
    assert hl.Checkpointer(tmp_path / "run" / "checkpoints", {}).steps == [5, 6]
    assert run(tmp_path / "run") == whole


# ----------------------------------------------------------- the end, and after it


def test_a_run_that_a_callback_ended_is_over_unless_more_is_asked_for(tmp_path):
    class Ends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    assert train(tmp_path, epochs=4, callbacks=[Ends()]).history.epoch == [0, 1]
    again = train(tmp_path, epochs=4, callbacks=[Ends()])
    assert again.history.epoch == [0, 1]
    assert again.optimizer.iterations == 2 * STEPS
    assert train(tmp_path, epochs=5, callbacks=[Ends()]).history.epoch == [0, 1, 2, 3, 4]


def test_it_says_where_it_goes_on(tmp_path, capsys):
    train(tmp_path, 8)
    model = Net()
    model.compile(momentum(), loss="mse", metrics=["mae"])
    model.fit(X, Y, batch_size=BATCH, epochs=2, validation_data=(X, Y), run_dir=tmp_path, verbose=2)
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == f"Resuming from {tmp_path / 'checkpoints'} at step 6 (epoch 2, batch 1)."
    count = len(bits(model))
    assert second.startswith(f"  Restored {count} variables and the state of the data, random numbers, History")
    assert rest[0] == "  Only in the checkpoint; ignored: callbacks.StopAt."
    assert rest[1].startswith("Epoch 2/2")


def test_it_says_what_is_other_than_when_it_was_saved(tmp_path, capsys, monkeypatch):
    train(tmp_path, epochs=1)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99")
    model = Net()
    model.drop.rate = 0.4
    model.compile(keras.optimizers.SGD(0.2, momentum=0.8), loss="mse", metrics=["mae"], steps_per_execution=2)
    new = keras.callbacks.LambdaCallback()
    model.fit(X, Y, batch_size=BATCH, epochs=1, validation_data=(X, Y), run_dir=tmp_path, verbose=2, callbacks=[new])
    told = capsys.readouterr().out
    assert "Not in the checkpoint; initialized from scratch: callbacks.LambdaCallback." in told
    assert re.search(
        r"Changed since the checkpoint; results will not be bitwise identical: python 3\.\S+ -> 3\.99; "
        r"steps_per_execution 1 -> 2; the configuration of state\.model\.drop, state\.model\.optimizer\.",
        told,
    )


def test_what_may_differ_is_named_and_begins_anew(tmp_path):
    train(tmp_path, epochs=1)
    added = ["state.model.extra.*", "*[state.model.extra.*", "*state.model.low.kernel*"]
    model = train(tmp_path, cls=Larger, epochs=2, allow=added)
    assert model.optimizer.iterations == 2 * STEPS
    assert model.history.epoch == [0, 1]


def test_the_log_has_each_epoch_once(tmp_path):
    train(tmp_path, 8, epochs=3)
    train(tmp_path, epochs=3)
    assert [line["epoch"] for line in epochs_in(tmp_path)] == [1, 2, 3]


def test_the_log_of_a_run_that_begins_anew_does_so_too(tmp_path):
    options = {"save": hl.every(steps=100), "epochs": 2}
    train(tmp_path, STEPS + 1, **options)
    assert [line["epoch"] for line in epochs_in(tmp_path)] == [1]
    train(tmp_path, **options)
    assert [line["epoch"] for line in epochs_in(tmp_path)] == [1, 2]


def test_a_metric_that_only_some_steps_use_goes_on_past_a_process_whose_steps_do_not(tmp_path):
    batches = [X[:4], X[4:6], X[6:10]]

    def run(directory, stop=0):
        seen = keras.metrics.Mean(name="seen")

        def step(x):
            if len(x) == 4:
                seen.update_state(x)
            return {"seen": seen, "mean": ops.mean(x)}

        options = {"state": {"seen": seen}, "save": EVERY_STEP, "run_dir": directory, "verbose": 0}
        return hl.fit(step, lambda: iter(batches), callbacks=[StopAt(stop)], **options).history

    whole = run(tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(Stopped):
            run(tmp_path / "run", 2)  # One more step is saved each time.
    assert run(tmp_path / "run") == whole


def test_the_log_tells_what_each_save_took(tmp_path):
    train(tmp_path, epochs=1)
    saves = saves_in(tmp_path)
    assert [save.data["saved_step"] for save in saves] == [2, 4, 5]
    for save in (save.data for save in saves):
        folder = tmp_path / "checkpoints" / f"step_{save['saved_step']:09d}"
        assert save["bytes"] == pytest.approx(sum(path.stat().st_size for path in folder.iterdir()), abs=8192)
        assert 0 < save["duration"] < 60
        assert 0 < save["waited"] < 60


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    options = {"epochs": 6, "save": hl.every(epochs=1), "keep": 2, "best": "max:val_loss"}
    model = train(tmp_path, **options)
    best = (1 + int(np.argmax(model.history.history["val_loss"]))) * STEPS
    steps = hl.Checkpointer(tmp_path / "checkpoints", {}).steps
    assert steps == sorted({best, 5 * STEPS, 6 * STEPS})


@pytest.mark.parametrize("save", [hl.every(steps=3), hl.every(epochs=4), hl.every(seconds=1000)])
def test_the_best_is_saved_when_it_is_reported_whenever_else_is_saved(save, tmp_path):
    model = train(tmp_path, cls=BestInTheSecondEpoch, epochs=6, save=save, keep=1, best="min:val_loss")
    assert np.argmin(model.history.history["val_loss"]) == 1
    checkpointer = hl.Checkpointer(tmp_path / "checkpoints", {}, best="min:val_loss")
    assert checkpointer.best_step == 2 * STEPS
    assert checkpointer.steps == [2 * STEPS, 6 * STEPS]


def test_without_save_there_is_only_the_log(tmp_path):
    train(tmp_path, save=None)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


# -------------------------------------------------------------------------- bad input


def test_a_variable_that_state_does_not_reach_is_an_error(tmp_path):
    variable, lost = keras.Variable(1.0), keras.Variable(2.0, name="lost")

    def step(x):
        variable.assign_add(lost * ops.sum(x))
        return {}

    with pytest.raises(StepError, match=r"step uses variables that would not be saved: .*lost.*Name in state"):
        hl.fit(step, X, state={"variable": variable}, run_dir=tmp_path, verbose=0)
    hl.fit(step, X, state={"variable": variable}, verbose=0)  # Not saved, it may.


def test_another_model_is_an_error_that_names_what_differs(tmp_path):
    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: .*state.model.extra.bias"):
        train(tmp_path, cls=Larger)


def test_a_directory_with_a_run_is_not_begun_anew(tmp_path):
    train(tmp_path)
    with pytest.raises(CheckpointError, match="up to step 15, and resume='never'"):
        train(tmp_path, resume="never")


def test_data_without_a_position_goes_on_by_reading_or_not_at_all(tmp_path):
    def batches():
        return iter([(X[:6], Y[:6]), (X[6:12], Y[6:12]), (X[12:18], Y[12:18])])

    def run(run_dir, stop=0, **options):
        model = Net()
        model.compile(momentum(), loss="mse")
        callbacks = [StopAt(stop)]
        with contextlib.suppress(Stopped):
            model.fit(
                batches, epochs=3, seed=1, run_dir=run_dir, save=EVERY_STEP, verbose=0, callbacks=callbacks, **options
            )
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "run", 5)
    with pytest.raises(CheckpointError, match="the function of data has no position to go on from"):
        run(tmp_path / "run", resume="exact")
    assert_same_bits(run(tmp_path / "run"), whole)


def test_what_failed_in_the_background_is_raised_by_the_next_step(tmp_path):
    def full(name, arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Wait(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            Wait.steps += 1
            if Wait.steps == 3:
                time.sleep(1)  # Long enough for a write that fails at once.

    install(Nth(1, full, {"mkdir"}))  # Of the second save.
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint of step 2 failed\. .*No space left.*make room"):
            train(tmp_path, save=hl.every(steps=1), epochs=1, callbacks=[Wait()])
    finally:
        install(None)
    assert Wait.steps == 3
    assert hl.Checkpointer(tmp_path / "checkpoints", {}).steps == [1]


def test_other_data_are_told_of_or_refused(tmp_path):
    def run(x, **options):
        model = Net()
        model.compile(momentum(), loss="mse")
        return model.fit(x, Y, batch_size=BATCH, epochs=2, seed=1, run_dir=tmp_path, verbose=0, **options)

    run(X)
    with pytest.raises(CheckpointError, match=r"not what it was when the run was saved: the values of x are others\. "):
        run(X + 1, resume="exact")
    run(X, resume="exact")
    with pytest.warns(HandloomWarning, match=r"the values of x are others\. It goes on after 0 batches of epoch 2"):
        run(X + 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resume": "yes"}, "resume takes one of 'auto'"),
        ({"save": 3}, r"save takes hl\.every"),
        ({"allow": "state.*"}, r"allow takes a list of patterns, such as \['state\.\*'\]"),
        ({"together": 0}, r"steps_per_execution=\.\.\.\) takes a whole number, at least 1; received 0"),
    ],
)
def test_options_that_are_none(options, words, tmp_path):
    with pytest.raises((TypeError, ValueError), match=words):
        train(tmp_path, **options)


# ---------------------------------------------------------------------------- signals

SCRIPT = """
    import os, signal, sys
    import keras, numpy as np
    import handloom as hl

    class Send(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_begin(self, batch, logs=None):
            Send.steps += 1
            if Send.steps == 4 and sys.argv[2] != "0":
                os.kill(os.getpid(), int(sys.argv[2]))

    model = hl.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("adam", loss="mse")
    x = np.ones((12, 3), "float32")
    history = model.fit(x, x[:, :1], batch_size=2, epochs=2, run_dir=sys.argv[1], verbose=2, callbacks=[Send()])
    print("steps", Send.steps, int(model.optimizer.iterations))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, -signal.SIGINT, marks=pytest.mark.once)],
)
def test_a_signal_saves_after_the_step_and_ends_as_the_signal_does(signum, code, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")

    def run(number):
        command = [sys.executable, str(script), str(tmp_path / "run"), str(number)]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)

    assert run(int(signum)).returncode == code
    again = run(0)
    assert again.returncode == 0, again.stderr
    assert "at step 4 (epoch 1, batch 4)." in again.stdout
    assert "steps 8 12" in again.stdout  # Twelve in all, eight of them now.


def test_a_signal_when_all_is_done_is_not_lost(tmp_path):
    def term(logs):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(tmp_path, epochs=1, callbacks=[keras.callbacks.LambdaCallback(on_train_end=term)])
    assert train(tmp_path, epochs=1).optimizer.iterations == STEPS


SLOW_DISK = """
    import os, signal, threading, time
    from handloom.checkpoint import filesystem

    class Slow:
        def __getattr__(self, name):
            return getattr(os, name)

        def rename(self, old, new):
            if "step_000000004" in str(new):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            os.rename(old, new)

    filesystem.os = Slow()
"""


@pytest.mark.once
def test_a_second_signal_ends_the_process_at_once_and_the_last_checkpoint_is_whole(tmp_path):
    script, run_dir = tmp_path / "script.py", tmp_path / "run"
    code = textwrap.dedent(SCRIPT)
    script.write_text(code.replace("epochs=2", "epochs=2, save=hl.every(steps=2)"), encoding="utf-8")
    slow = tmp_path / "slow.py"
    slow.write_text(textwrap.dedent(SLOW_DISK) + script.read_text(encoding="utf-8"), encoding="utf-8")
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, str(slow), str(run_dir), str(int(signal.SIGTERM))], check=False)
    assert ended.returncode == -signal.SIGTERM  # By the second, which came while the first had the run saved.
    assert time.monotonic() - begun < 50
    assert hl.Checkpointer(run_dir / "checkpoints", {}).steps == [2]
    again = subprocess.run(
        [sys.executable, str(script), str(run_dir), "0"], check=False, capture_output=True, text=True
    )
    assert "at step 2 (epoch 1, batch 2)." in again.stdout, again.stderr
    assert "steps 10 12" in again.stdout
