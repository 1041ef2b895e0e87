"""When a run is saved and how it resumes. That the results are bitwise identical is tested in `tests/resume`, too."""

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
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.errors import CheckpointError, HandloomWarning, StepError
from tests.checkpoint.common import Nth, install
from tests.models import compiled, sequential
from tests.numbers import normal, ones, same_values
from tests.resume import runs
from tests.resume.runs import Net
from tests.resume.stopped import StopAt, Stopped
from tests.run.run_log import epochs_in, saves_in

X = normal(26, 3)
Y = X[:, :1] ** 2
EVERY_STEP = hl.every(steps=1)
BATCH, STEPS = 6, 5  # The last batch of an epoch is smaller.
hook = keras.callbacks.LambdaCallback


class Noisy(Net):
    """Draws random numbers in validation, from a generator of its own and from Keras's, and counts its test steps."""

    def __init__(self):
        super().__init__()
        self.seed, self.validated = keras.random.SeedGenerator(5), keras.Variable(0, dtype="int32", trainable=False)

    def test_step(self, data):
        x, y = data
        self.validated.assign(self.validated + 1)
        x = x + keras.random.normal(ops.shape(x), seed=self.seed) + keras.random.normal(ops.shape(x))
        return super().test_step((x, y))


class Larger(Net):
    def __init__(self):
        super().__init__()
        self.extra = layers.Dense(4)

    def call(self, x, training=False):
        return super().call(self.extra(x), training)


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def train(run_dir, *callbacks, stop=0, cls=Net, data=(X, Y), together=1, **options):
    """Trains a new model, to the end or until it is stopped."""
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    model = compiled(cls(), optimizer, metrics=["mae"], steps_per_execution=together)
    options = {"epochs": 3, "save": hl.every(steps=2), "seed": 1, "verbose": 0} | options
    options["callbacks"] = [StopAt(stop), *callbacks]
    if callable(data):
        data = [data]
    else:
        options = {"batch_size": BATCH, "validation_data": (X, Y)} | options
    with contextlib.suppress(Stopped):
        model.fit(*data, run_dir=run_dir, **options)
    return model


def saved_steps(run_dir):
    return hl.Checkpointer(run_dir / "checkpoints", {}).steps


def assert_same(model, other):
    assert (model.history.epoch, model.history.history) == (other.history.epoch, other.history.history)
    same_values([model, model.optimizer], [other, other.optimizer])


# ------------------------------------------------------------------------ resuming


def test_fit_with_steps_per_execution_resumes_with_the_same_groups_also_by_auto(tmp_path, capsys):
    options = {"save": hl.every(steps=4), "epochs": 2, "verbose": 2}
    whole = train(tmp_path / "whole", together=2, **options)  # In groups of 2, 2, 1 an epoch.
    for stop, together in ((1, 2), (3, 2), (5, "auto")):
        train(tmp_path / str(stop), stop=stop, together=2, **options)
        assert_same(train(tmp_path / str(stop), together=together, **options), whole)
    assert "Changed since" not in capsys.readouterr().out


def test_fit_resumes_right_after_the_last_of_steps_per_epoch(tmp_path):
    def stop(epoch, logs):
        raise Stopped

    options = {"steps_per_epoch": 3, "save": EVERY_STEP}
    train(tmp_path / "run", hook(on_epoch_end=stop), **options)
    assert saved_steps(tmp_path / "run") == [1, 2, 3]
    assert_same(train(tmp_path / "run", **options), train(tmp_path / "whole", **options))


@pytest.mark.parametrize("validation", [1, 2], ids=["the first", "the second"])
def test_fit_validates_again_after_a_signal_in_the_validation_of_an_epoch(validation, tmp_path):
    begun = []

    def stop(batch, logs):
        begun.extend([batch] if batch == 0 else [])
        if len(begun) == validation and batch == 1:
            terminate()

    options = {"cls": Noisy, "epochs": 2, "validation_batch_size": 6, "save": hl.every(epochs=5)}
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", hook(on_test_batch_end=stop), **options)
    assert ended.value.code == 128 + signal.SIGTERM
    assert saved_steps(tmp_path / "run") == [validation * STEPS]
    assert_same(train(tmp_path / "run", **options), whole)
    assert [line["epoch"] for line in epochs_in(tmp_path / "run")] == [1, 2]


def test_fit_validates_again_after_a_signal_in_a_validation_within_an_epoch(tmp_path):
    words = []

    def stop(word):
        words.append(word)
        if words.count("validate") == 2 and word == "validate":
            terminate()

    whole = runs.outcome("step", tmp_path / "whole")
    with pytest.raises(SystemExit):
        runs.outcome("step", tmp_path / "run", stop)  # After eight steps, validated after each fourth one.
    assert saved_steps(tmp_path / "run")[-1] == 8
    assert runs.outcome("step", tmp_path / "run") == whole


def test_fit_leaves_a_run_ended_that_a_callback_has_ended_unless_it_is_asked_for_more_epochs(tmp_path):
    class Ends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    assert train(tmp_path, Ends(), epochs=4).history.epoch == [0, 1]
    again = train(tmp_path, Ends(), epochs=4)
    assert (again.history.epoch, int(again.optimizer.iterations)) == ([0, 1], 2 * STEPS)
    assert train(tmp_path, Ends(), epochs=5).history.epoch == [0, 1, 2, 3, 4]


def test_fit_tells_where_it_resumes_and_what_has_changed(tmp_path, capsys, monkeypatch):
    train(tmp_path, stop=8)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99")
    model = Net()
    model.drop.rate = 0.4
    compiled(model, keras.optimizers.SGD(0.2, momentum=0.8), metrics=["mae"], steps_per_execution=2)
    options = {"batch_size": BATCH, "epochs": 2, "validation_data": (X, Y), "run_dir": tmp_path, "verbose": 2}
    model.fit(X, Y, callbacks=[hook()], **options)
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == f"Resuming from {tmp_path / 'checkpoints'} at step 6 (epoch 2, batch 1)."
    count = len(named({"model": model})[0])
    assert second.startswith(f"  Restored {count} variables and the state of the data, random numbers, History")
    assert rest[0] == "  Not in the checkpoint; initialized from scratch: callbacks.LambdaCallback."
    assert rest[1] == "  Only in the checkpoint; ignored: callbacks.StopAt."
    assert re.match(
        r"  Changed since the checkpoint; results will not be bitwise identical: python 3\.\S+ -> 3\.99, "
        r"steps_per_execution 1 -> 2, the configuration of state\.model\.drop, state\.model\.optimizer\.$",
        rest[2],
    )
    assert rest[3].startswith("Epoch 2/2")


def test_fit_resumes_another_model_only_if_allow_names_what_differs(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: .*state.model.extra.bias"):
        train(tmp_path, cls=Larger)
    added = ["state.model.extra.*", "*[state.model.extra.*", "*state.model.low.kernel*"]
    model = train(tmp_path, cls=Larger, epochs=2, allow=added)
    assert (model.history.epoch, int(model.optimizer.iterations)) == ([0, 1], 2 * STEPS)


def test_fit_reports_a_metric_that_only_steps_of_an_earlier_process_updated(tmp_path):
    batches = [X[:4], X[4:6], X[6:10]]

    def run(directory, stop=0):
        seen = keras.metrics.Mean()

        def step(x):
            if len(x) == 4:
                seen.update_state(x)
            return {"seen": seen, "mean": ops.mean(x)}

        options = {"state": {"seen": seen}, "save": EVERY_STEP, "run_dir": str(directory), "verbose": 0}
        return hl.fit(step, lambda: iter(batches), callbacks=[StopAt(stop)], **options).history

    whole = run(tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(Stopped):
            run(tmp_path / "run", 2)  # One more step is saved each time.
    assert run(tmp_path / "run") == whole


@pytest.mark.parametrize("resume", ["auto", "exact"])
def test_fit_does_not_start_from_scratch_where_all_checkpoints_are_damaged(resume, tmp_path):
    train(tmp_path, epochs=1)
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        os.truncate(manifest, 10)
    with pytest.raises(CheckpointError, match=r"All checkpoints in .* are damaged.*HL542"):
        train(tmp_path, epochs=2, resume=resume)
    with pytest.raises(CheckpointError, match=r"has checkpoints of a run, up to step 5.*HL752"):
        train(tmp_path, epochs=2, resume="never")


# -------------------------------------------------------------------------- saving


def test_fit_logs_the_size_and_duration_of_each_save(tmp_path):
    train(tmp_path, epochs=1)
    saves = saves_in(tmp_path)
    assert [save.data["saved_step"] for save in saves] == [2, 4, 5]
    for save in (save.data for save in saves):
        folder = tmp_path / "checkpoints" / f"step_{save['saved_step']:09d}"
        assert save["bytes"] == pytest.approx(sum(path.stat().st_size for path in folder.iterdir()), abs=8192)
        assert 0 < save["duration"] < 60
        assert 0 < save["waited"] < 60


@pytest.mark.parametrize("save", [hl.every(steps=3), hl.every(epochs=4), hl.every(seconds=1000)])
def test_fit_saves_the_best_when_it_is_reported_whenever_else_it_saves(save, tmp_path):
    losses, options = iter([3, 1, 2, 4, 5, 6]), {"run_dir": tmp_path, "save": save, "keep": 1, "best": "min:val_loss"}
    hl.fit(lambda x: {}, X, epochs=6, validate=lambda: {"loss": next(losses)}, verbose=0, **options)  # A step an epoch.
    assert saved_steps(tmp_path) == [2, 6]


def test_fit_with_save_none_writes_only_the_log(tmp_path):
    train(tmp_path, save=None)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_fit_raises_an_error_of_the_background_at_the_next_step(tmp_path):
    def full(name, arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait(batch, logs):
        steps.append(batch)
        if len(steps) == 3:
            time.sleep(1)  # Long enough for a write that fails at once.

    steps = []
    install(Nth(1, full, {"mkdir"}))  # Of the second save.
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint of step 2 failed\. .*No space left"):
            train(tmp_path, hook(on_train_batch_end=wait), save=EVERY_STEP, epochs=1)
    finally:
        install(None)
    assert len(steps) == 3
    assert saved_steps(tmp_path) == [1]


# -------------------------------------------------------------------------- errors


def test_fit_refuses_to_save_a_step_with_a_variable_outside_of_state(tmp_path):
    variable, lost = keras.Variable(1.0), keras.Variable(2.0, name="lost")

    def step(x):
        variable.assign_add(lost * ops.sum(x))
        return {}

    with pytest.raises(
        StepError,
        match=r"step uses variables that are not in state and .*: lost\..* state=\{\.\.\., 'name': variable\};.*HL250",
    ):
        hl.fit(step, X, state={"variable": variable}, run_dir=tmp_path, verbose=0)
    hl.fit(step, X, state={"variable": variable}, verbose=0)  # A run that is not saved may use it.


def test_fit_names_what_state_lacks_as_the_step_does(tmp_path):
    net, parts = sequential(), {"adam": keras.optimizers.Adam(), "error": keras.metrics.Mean()}

    def step(x):
        parts["error"].update_state(x)
        return {"loss": hl.minimize(lambda: ops.sum(net(x) ** 2), net, parts["adam"])}

    state = {"net": net, "parts_adam": parts["adam"], "parts_error": parts["error"]}
    of_parts = "'parts_adam': parts['adam'], 'parts_error': parts['error']"
    for given, words in (({}, f"'net': net, {of_parts}"), ({"net": net}, f"..., {of_parts}")):
        with pytest.raises(StepError, match=re.escape(f"state={{{words}}};")):
            hl.fit(step, ones(4, 3), state=given, run_dir=tmp_path, verbose=0)
    hl.fit(step, ones(4, 3), state=state, run_dir=tmp_path, verbose=0)


def test_fit_with_resume_never_refuses_a_directory_with_checkpoints(tmp_path):
    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"up to step 15, and resume='never' .*Use another run_dir.*HL752"):
        train(tmp_path, resume="never")


def test_fit_resumes_data_without_a_position_by_reading_it_again_and_with_resume_exact_not_at_all(tmp_path):
    def batches():
        return iter([(X[:6], Y[:6]), (X[6:12], Y[6:12]), (X[12:18], Y[12:18])])

    options = {"data": batches, "save": EVERY_STEP}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "run", stop=5, **options)
    with pytest.raises(CheckpointError, match=r"needs data with a position; the function of data has none.*HL753"):
        train(tmp_path / "run", resume="exact", **options)
    assert_same(train(tmp_path / "run", **options), whole)


def test_fit_warns_of_other_data_and_with_resume_exact_refuses_it(tmp_path):
    train(tmp_path, epochs=2)
    with pytest.raises(CheckpointError, match=r"has changed since the run was saved: .* of x .*same data.*HL754"):
        train(tmp_path, data=(X + 1, Y), epochs=2, resume="exact")
    train(tmp_path, epochs=2, resume="exact")
    with pytest.warns(HandloomWarning, match=r"values of x"):
        train(tmp_path, data=(X + 1, Y), epochs=2)


# ------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_fit_saves_after_the_step_at_a_signal_and_raises_as_the_signal_does(signum, error, tmp_path):
    send = hook(on_train_batch_begin=lambda batch, logs: signal.raise_signal(signum) if batch == 2 else None)
    with pytest.raises(error):
        train(tmp_path / "run", send)
    assert saved_steps(tmp_path / "run") == [2, 3]
    assert_same(train(tmp_path / "run"), train(tmp_path / "whole"))


SENDS_TWO_SIGNALS = """
    import os, signal, sys, time
    import keras, numpy as np
    import handloom as hl
    from handloom.checkpoint import filesystem

    def send(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    class SlowDisk:
        def __getattr__(self, name):
            return getattr(os, name)

        def rename(self, old, new):
            if "step_000000003" in str(new):
                send()
                time.sleep(600)
            os.rename(old, new)

    filesystem.os = SlowDisk()
    send_first = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: batch == 2 and send())
    hl.fit(lambda x: {}, np.ones(200), run_dir=sys.argv[1], save=hl.every(steps=2), callbacks=[send_first])
"""


@pytest.mark.once
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_fit_exits_at_once_at_a_second_signal_and_leaves_the_last_checkpoint_whole(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SENDS_TWO_SIGNALS), str(tmp_path)]  # It imports a backend.
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert saved_steps(tmp_path) == [2]
    assert hl.load_checkpoint(tmp_path).step == 2


def test_fit_does_not_lose_a_signal_that_comes_after_the_last_save(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, hook(on_train_end=terminate), epochs=1)
    assert int(train(tmp_path, epochs=1).optimizer.iterations) == STEPS
