"""`hl.Checkpointer`: saves in the background, restores the newest complete checkpoint, reports failures."""

import errno
import os
import threading
import warnings

import numpy as np
import pytest

import handloom as hl
from handloom.errors import ArgumentError, CheckpointError, HandloomWarning
from tests.checkpoint.common import ARRAYS, CONTENTS, Nth, failing, flip, install, save

pytestmark = pytest.mark.once


class Counter:
    """An object without arrays."""

    def __init__(self, count=0):
        self.count = count

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


def a_state(value=0.0, count=0):
    return {"model": {"w": np.full((2, 3), value, "float32")}, "counter": Counter(count)}


@pytest.fixture
def slow_disk():
    """A disk that waits for an event."""
    event = threading.Event()
    install(Nth(0, lambda name, arguments: event.wait(10), {"mkdir"}))
    yield event
    event.set()


def full_disk():
    install(Nth(0, failing(errno.ENOSPC), {"mkdir"}))


# ------------------------------------------------------------- save and restore


def test_restore_returns_the_saved_state(tmp_path):
    with hl.Checkpointer(tmp_path / "run", a_state(3.0, 5)) as checkpointer:
        checkpointer.save(10)
    state = a_state()
    assert hl.Checkpointer(tmp_path / "run", state).restore() == 10
    assert (state["model"]["w"] == 3.0).all()
    assert state["counter"].count == 5


def test_restore_without_checkpoints_returns_none_and_creates_nothing(tmp_path):
    assert hl.Checkpointer(tmp_path / "run", a_state()).restore() is None
    assert not (tmp_path / "run").exists()


def test_checkpointer_steps_are_those_in_the_directory(tmp_path):
    with hl.Checkpointer(str(tmp_path), a_state(), keep=2) as checkpointer:
        assert checkpointer.steps == []
        for step in (0, 5, np.int64(7)):
            checkpointer.save(step)
        checkpointer.wait()
        assert checkpointer.steps == [5, 7]


def test_is_best_compares_with_all_checkpoints(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(), best="min:loss") as checkpointer:
        assert not checkpointer.is_best({"other": 1.0})
        assert checkpointer.is_best({"loss": 2.0})
        checkpointer.save(1)  # Without the metric.
        assert checkpointer.is_best({"loss": 2.0})
        checkpointer.save(2, {"loss": 2.0})
        assert checkpointer.is_best({"loss": 1.9})
        assert not any(checkpointer.is_best({"loss": loss}) for loss in (2.0, 2.1, float("nan"), -float("inf")))
    assert not hl.Checkpointer(tmp_path, a_state()).is_best({"loss": 1.0})


def test_restore_takes_a_step_such_as_best_step(tmp_path):
    state = a_state()
    with hl.Checkpointer(tmp_path, state, keep=2, best="min:loss") as checkpointer:
        assert checkpointer.best_step is None
        for step, loss in enumerate([3.0, 1.0, np.float32(2.0), 5.0]):
            state["model"]["w"][:] = loss
            checkpointer.save(step, {"loss": loss, "other": 0.5})
        assert checkpointer.restore(checkpointer.best_step) == 1
        assert (state["model"]["w"] == 1.0).all()
        assert checkpointer.restore() == 3
        assert (state["model"]["w"] == 5.0).all()
        with pytest.raises(CheckpointError, match=r"has no checkpoint of step 0; it has 1, 2, 3\."):
            checkpointer.restore(0)
    assert hl.Checkpointer(tmp_path, a_state(), best="max:loss").best_step == 3
    assert hl.Checkpointer(tmp_path, a_state()).best_step is None
    assert hl.load_checkpoint(tmp_path / "step_000000001").metrics == {"loss": 1.0, "other": 0.5}


def test_checkpointer_warns_of_a_best_metric_that_never_came(tmp_path):
    checkpointer = hl.Checkpointer(tmp_path, a_state(), best="min:val_los")
    checkpointer.save(1, {"loss": 1.0, "val_loss": 2.0})
    with pytest.warns(HandloomWarning, match=r"names 'val_los'; .* were loss, val_loss\. \[HL504\]"):
        checkpointer.close()


def test_restore_refuses_another_state_before_it_reads_arrays(tmp_path):
    with hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(3)}}) as checkpointer:
        checkpointer.save(1)
    with hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(4)}}) as checkpointer:
        checkpointer.save(2)
    flip(tmp_path / "step_000000002" / ARRAYS)
    with pytest.raises(CheckpointError, match=r"model\.w is \(4,\) in the checkpoint and \(3,\) here"):
        hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(3)}}).restore()


def test_restore_skips_a_damaged_checkpoint_and_save_replaces_it(tmp_path):
    state = a_state()
    with hl.Checkpointer(tmp_path, state, keep=2) as checkpointer:
        for step in (10, 20, 30):
            state["model"]["w"][:] = step
            checkpointer.save(step)
    flip(tmp_path / "step_000000030" / ARRAYS)
    with hl.Checkpointer(tmp_path, state, keep=2) as checkpointer:
        words = r"Skipping damaged checkpoint step_000000030; using step_000000020\. .*'model\.w'"
        with pytest.warns(HandloomWarning, match=words) as seen:
            assert checkpointer.restore() == 20
        assert seen[0].filename == __file__
        assert state["model"]["w"][0, 0] == 20
        checkpointer.save(25)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step_000000020", "step_000000025"}
    assert checkpointer.restore() == 25
    for step in (20, 25):
        flip(tmp_path / f"step_0000000{step}" / CONTENTS)
    with pytest.raises(
        CheckpointError, match=r"All checkpoints in .* are damaged\. .*step_000000025.*_000000020.*HL542"
    ):
        checkpointer.restore()


def test_save_refuses_a_step_before_the_last_one(tmp_path):
    save(tmp_path, 100)
    with hl.Checkpointer(tmp_path, {}) as checkpointer, pytest.raises(CheckpointError, match="HL538") as raised:
        checkpointer.save(7)
    assert f"Step 7 cannot be saved: {tmp_path} holds step_000000100, which is later." in str(raised.value)
    assert checkpointer.steps == [100]


# -------------------------------------------------------------- in the background


def test_save_waits_for_the_copy_but_not_for_the_disk(tmp_path, slow_disk):
    state = a_state(1.0)
    with hl.Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1)
        assert checkpointer.steps == []
        assert checkpointer.written is None
        state["model"]["w"][:] = 2.0  # Training continues meanwhile.
        slow_disk.set()
        checkpointer.wait()
        assert checkpointer.steps == [1]
    assert (hl.load_checkpoint(tmp_path).arrays["model.w"] == 1.0).all()
    assert (checkpointer.written.step, checkpointer.written.bytes > 24) == (1, True)
    assert 0 < checkpointer.written.seconds < 60


def test_save_waits_for_the_checkpoint_before(tmp_path, slow_disk):
    threading.Timer(0.2, slow_disk.set).start()
    with hl.Checkpointer(tmp_path, a_state()) as checkpointer:
        checkpointer.save(1)
        checkpointer.save(2)
        assert 1 in checkpointer.steps
    assert checkpointer.steps == [1, 2]


@pytest.mark.parametrize("call", ["save", "restore", "wait", "close"])
def test_checkpointer_raises_a_failed_save_with_the_next_call(tmp_path, call):
    checkpointer = hl.Checkpointer(tmp_path, a_state(), keep=1)
    checkpointer.save(1)
    checkpointer.wait()
    full_disk()
    checkpointer.save(2)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 failed.*No space.*are intact.*HL502") as raised:
        getattr(checkpointer, call)(*[3] * (call == "save"))
    assert isinstance(raised.value.__cause__, CheckpointError)
    install(None)
    assert checkpointer.steps == [1]
    checkpointer.save(3)  # It is raised once.
    checkpointer.close()
    assert checkpointer.steps == [3]


def test_checkpointer_adds_a_failed_save_as_a_note_to_the_error_of_its_block(tmp_path):
    def run():
        with hl.Checkpointer(tmp_path, a_state()) as checkpointer:
            full_disk()
            checkpointer.save(1)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own") as raised:
        run()
    [note] = raised.value.__notes__
    assert "step 1 failed" in note


def test_close_lets_another_write_after_a_failure_too(tmp_path):
    checkpointer = hl.Checkpointer(tmp_path, a_state())
    full_disk()
    checkpointer.save(1)
    with pytest.raises(CheckpointError):
        checkpointer.close()
    install(None)
    with hl.Checkpointer(tmp_path, a_state()) as other:
        other.save(1)
    checkpointer.save(2)  # It opens again.
    checkpointer.close()
    assert checkpointer.steps == [1, 2]


# ------------------------------------------------------------------------ errors


def test_save_refuses_an_invalid_state_at_once(tmp_path):
    state = {"counter": Counter(object())}
    with hl.Checkpointer(tmp_path, state) as checkpointer:
        with pytest.raises(CheckpointError, match=r"counter\.count is a object, which cannot be saved"):
            checkpointer.save(4)
        state["counter"].count = 1
        with pytest.raises(TypeError, match="takes numbers as metrics; 'loss' is 'much'"):
            checkpointer.save(4, {"loss": "much"})
        checkpointer.save(4)
    assert checkpointer.steps == [4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_save_refuses_a_state_that_is_not_finite(tmp_path, value):
    state = a_state(1.0)
    with hl.Checkpointer(tmp_path, state, keep=1) as checkpointer:
        checkpointer.save(1)
        state["model"]["w"][1, 2] = value
        words = r"at step 2 is not saved: NaN or infinity in model\.w\..*finite=False"
        with pytest.warns(HandloomWarning, match=words) as seen:
            checkpointer.save(2)
        assert seen[0].filename == __file__
        assert checkpointer.restore() == 1
    assert (state["model"]["w"] == 1.0).all()
    assert checkpointer.steps == [1]


def test_save_with_finite_false_takes_any_state(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(-np.inf), finite=False) as checkpointer:
        checkpointer.save(1)
    assert (hl.load_checkpoint(tmp_path).arrays["model.w"] == -np.inf).all()


def test_checkpointer_checks_on_entry_that_it_can_write(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(1.0)) as checkpointer:
        with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()}"):
            hl.Checkpointer(tmp_path, a_state()).__enter__()
        checkpointer.save(1)
        checkpointer.wait()
        assert hl.Checkpointer(tmp_path, a_state()).restore() == 1  # Reading needs no lock.


def test_checkpointer_takes_whole_numbers_for_keep_and_steps(tmp_path):
    with pytest.raises(ArgumentError, match=r"hl.Checkpointer\(keep=\.\.\.\) takes a whole number, at least 1"):
        hl.Checkpointer(tmp_path, {}, keep=0)
    with pytest.raises(ArgumentError, match=r"step=\.\.\.\) takes a whole number, at least 0"):
        hl.Checkpointer(tmp_path, {}).save(-1)


def test_checkpointer_gives_no_warning_without_a_reason(tmp_path):
    with warnings.catch_warnings(), hl.Checkpointer(tmp_path, a_state(), best="min:loss") as checkpointer:
        warnings.simplefilter("error")
        checkpointer.save(1)
        checkpointer.save(2, {"loss": float("nan")})
        assert checkpointer.restore() == 2
