"""`hl.Checkpointer`: saves in the background, restores the newest whole checkpoint, says what failed."""

import errno
import os
import threading
import warnings

import numpy as np
import pytest

import handloom as hl
from handloom.errors import CheckpointError, HandloomWarning
from tests.checkpoint.common import Nth, install, save

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _own_system():
    yield
    install(None)


class Counter:
    """Something that carries no arrays."""

    def __init__(self):
        self.count = 0

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


def a_state(value=0.0):
    return {"model": {"w": np.full((2, 3), value, "float32")}, "counter": Counter()}


@pytest.fixture
def slow_disk():
    """A disk that answers only when it is told to."""
    go_on = threading.Event()
    install(Nth(0, lambda name, arguments: go_on.wait(10), {"mkdir"}))
    yield go_on
    go_on.set()


def fails(call=0, name="mkdir"):
    def act(name, arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    install(Nth(call, act, {name}))


# ------------------------------------------------------------- save and restore


def test_what_was_saved_is_restored(tmp_path):
    state = a_state(3.0)
    state["counter"].count = 5
    with hl.Checkpointer(tmp_path / "run", state) as checkpointer:
        checkpointer.save(10)
    again = a_state()
    assert hl.Checkpointer(tmp_path / "run", again).restore() == 10
    np.testing.assert_array_equal(again["model"]["w"], np.full((2, 3), 3.0, "float32"))
    assert again["counter"].count == 5


def test_with_nothing_to_restore_the_step_is_none_and_nothing_is_made(tmp_path):
    assert hl.Checkpointer(tmp_path / "run", a_state()).restore() is None
    assert not (tmp_path / "run").exists()


def test_steps_are_those_that_are_there(tmp_path):
    with hl.Checkpointer(str(tmp_path), a_state(), keep=2) as checkpointer:
        assert checkpointer.steps == []
        for step in (0, 5, np.int64(7)):
            checkpointer.save(step)
        checkpointer.wait()
        assert checkpointer.steps == [5, 7]


def test_the_best_is_kept_besides(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(), keep=1, best="max:accuracy") as checkpointer:
        for step, accuracy in enumerate([0.1, 0.9, np.float32(0.3), 0.9]):
            checkpointer.save(step, {"accuracy": accuracy, "loss": 1.0})
    assert checkpointer.steps == [1, 3]
    assert hl.load_checkpoint(tmp_path / "step_000000001").metrics == {"accuracy": 0.9, "loss": 1.0}


def test_it_tells_whether_one_would_be_the_best(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(), best="min:loss") as checkpointer:
        assert not checkpointer.is_best({"other": 1.0})
        assert checkpointer.is_best({"loss": 2.0})
        checkpointer.save(1)  # Without the metric: it is no measure for others.
        assert checkpointer.is_best({"loss": 2.0})
        checkpointer.save(2, {"loss": 2.0})
        assert checkpointer.is_best({"loss": 1.9})
        assert not any(checkpointer.is_best({"loss": loss}) for loss in (2.0, 2.1, float("nan"), -float("inf")))
    with hl.Checkpointer(tmp_path / "other", a_state()) as checkpointer:
        assert not checkpointer.is_best({"loss": 1.0})


def test_that_of_a_step_is_restored_the_best_one_say(tmp_path):
    state = a_state()
    with hl.Checkpointer(tmp_path, state, keep=2, best="min:loss") as checkpointer:
        assert checkpointer.best_step is None
        for step, loss in enumerate([3.0, 1.0, 2.0, 5.0]):
            state["model"]["w"][:] = loss
            checkpointer.save(step, {"loss": loss})
        checkpointer.wait()
        assert checkpointer.best_step == 1
        assert checkpointer.restore(checkpointer.best_step) == 1
        assert (state["model"]["w"] == 1.0).all()
        assert checkpointer.restore() == 3
        assert (state["model"]["w"] == 5.0).all()
        with pytest.raises(CheckpointError, match=r"holds no checkpoint of step 0; there are 1, 2, 3\."):
            checkpointer.restore(0)
        path = tmp_path / "step_000000002" / "contents.json"
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(CheckpointError, match=r"No checkpoint .* is whole\. .*step_000000002/contents\.json"):
            checkpointer.restore(2)
    again = hl.Checkpointer(tmp_path, a_state(), best="max:loss")
    assert again.best_step == 3  # Of those that are there.
    assert hl.Checkpointer(tmp_path, a_state()).best_step is None


def test_a_metric_for_the_best_that_never_came_is_named(tmp_path):
    checkpointer = hl.Checkpointer(tmp_path, a_state(), best="min:val_los")
    checkpointer.save(1, {"loss": 1.0, "val_loss": 2.0})
    with pytest.warns(HandloomWarning, match=r"No best .* asks for 'val_los', .* was given are loss, val_loss\."):
        checkpointer.close()


def test_a_checkpoint_of_something_else_is_refused_and_not_passed_over(tmp_path):
    with hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(3)}}) as checkpointer:
        checkpointer.save(1)
    with hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(4)}}) as checkpointer:
        checkpointer.save(2)
        assert checkpointer.restore() == 2
    with pytest.raises(CheckpointError, match=r"model\.w"):
        hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(3)}}).restore()


def test_shapes_are_compared_before_an_array_is_read(tmp_path):
    with hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(3)}}) as checkpointer:
        checkpointer.save(1)
    path = tmp_path / "step_000000001" / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"model\.w"):  # And not that it is damaged.
        hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(4)}}).restore()


def test_a_damaged_newest_one_is_passed_over_with_a_warning_and_then_replaced(tmp_path):
    state = a_state()
    with hl.Checkpointer(tmp_path, state, keep=2) as checkpointer:
        for step in (10, 20, 30):
            state["model"]["w"][:] = step
            checkpointer.save(step)
    path = tmp_path / "step_000000030" / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with hl.Checkpointer(tmp_path, state, keep=2) as checkpointer:
        with pytest.warns(
            HandloomWarning, match=r"step_000000030 is passed over for step_000000020.*'model\.w'"
        ) as seen:
            assert checkpointer.restore() == 20
        assert seen[0].filename == __file__
        assert state["model"]["w"][0, 0] == 20
        checkpointer.save(25)  # The run comes by again, more slowly.
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step_000000020", "step_000000025"}
    assert checkpointer.restore() == 25


def test_an_earlier_step_is_refused_at_once_unless_the_later_one_was_damaged(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    with hl.Checkpointer(tmp_path, {}) as checkpointer, pytest.raises(CheckpointError, match="of a later step than 1"):
        checkpointer.save(1)


def test_none_whole_is_an_error_of_restore(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole.*manifest.json cannot be opened"):
        hl.Checkpointer(tmp_path, {}).restore()


# -------------------------------------------------------------- in the background


def test_a_save_waits_for_the_copy_and_not_for_the_disk(tmp_path, slow_disk):
    state = a_state(1.0)
    checkpointer = hl.Checkpointer(tmp_path, state)
    checkpointer.save(1)
    assert checkpointer.steps == []
    state["model"]["w"][:] = 2.0  # Training goes on meanwhile.
    slow_disk.set()
    checkpointer.wait()
    assert checkpointer.steps == [1]
    assert (hl.load_checkpoint(tmp_path).arrays["model.w"] == 1.0).all()
    checkpointer.close()


def test_one_write_at_a_time_is_under_way(tmp_path, slow_disk):
    threading.Timer(0.2, slow_disk.set).start()
    with hl.Checkpointer(tmp_path, a_state()) as checkpointer:
        checkpointer.save(1)
        checkpointer.save(2)
        assert 1 in checkpointer.steps
    assert checkpointer.steps == [1, 2]


@pytest.mark.parametrize("call", ["save", "restore", "wait", "close"])
def test_what_failed_in_the_background_is_raised_by_the_next_call(tmp_path, call):
    checkpointer = hl.Checkpointer(tmp_path, a_state(), keep=1)
    checkpointer.save(1)
    checkpointer.wait()
    fails()
    checkpointer.save(2)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 failed.*No space.*still are") as raised:
        getattr(checkpointer, call)(*[3] * (call == "save"))
    assert isinstance(raised.value.__cause__, CheckpointError)
    install(None)
    assert checkpointer.steps == [1]
    checkpointer.save(3)  # And then it is over.
    checkpointer.close()
    assert checkpointer.steps == [3]


def test_an_error_in_the_block_is_not_hidden_by_one_in_the_background(tmp_path):
    def run():
        with hl.Checkpointer(tmp_path, a_state()) as checkpointer:
            fails()
            checkpointer.save(1)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own") as raised:
        run()
    [note] = raised.value.__notes__
    assert "step 1 failed" in note


def test_what_a_save_took_is_known_when_it_is_done(tmp_path):
    with hl.Checkpointer(tmp_path, {"model": {"w": np.zeros(100_000)}}) as checkpointer:
        checkpointer.save(1)
        assert checkpointer.written is None
    written = checkpointer.written
    assert written.step == 1
    assert written.bytes >= 800_000
    assert 0 < written.seconds < 60


def test_a_failure_lets_another_write(tmp_path):
    checkpointer = hl.Checkpointer(tmp_path, a_state())
    fails()
    checkpointer.save(1)
    with pytest.raises(CheckpointError):
        checkpointer.close()
    install(None)
    with hl.Checkpointer(tmp_path, a_state()) as other:
        other.save(1)
    checkpointer.save(2)  # A closed one opens again.
    checkpointer.close()
    assert checkpointer.steps == [1, 2]


def test_what_cannot_be_saved_is_said_at_once(tmp_path):
    state = {"counter": Counter()}
    with hl.Checkpointer(tmp_path, state) as checkpointer:
        state["counter"].count = object()
        with pytest.raises(CheckpointError, match=r"counter\.count is a object, which cannot be saved"):
            checkpointer.save(4)
        state["counter"].count = 1
        with pytest.raises(TypeError, match="takes numbers as metrics; 'loss' is 'much'"):
            checkpointer.save(4, {"loss": "much"})
        checkpointer.save(4)
    assert checkpointer.steps == [4]


# ----------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_never_becomes_the_newest(tmp_path, value):
    state = a_state(1.0)
    with hl.Checkpointer(tmp_path, state, keep=1) as checkpointer:
        checkpointer.save(1)
        state["model"]["w"][1, 2] = value
        with pytest.warns(
            HandloomWarning, match=r"at step 2 is not saved: NaN or infinity in model\.w\..*finite=False"
        ) as seen:
            checkpointer.save(2)
        assert seen[0].filename == __file__
        assert checkpointer.restore() == 1
    assert (state["model"]["w"] == 1.0).all()
    assert checkpointer.steps == [1]


def test_one_that_is_meant_to_be_is_saved(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(-np.inf), finite=False) as checkpointer:
        checkpointer.save(1)
    assert (hl.load_checkpoint(tmp_path).arrays["model.w"] == -np.inf).all()


def test_entering_finds_out_what_would_fail_later(tmp_path):
    with (
        hl.Checkpointer(tmp_path, a_state()),
        pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()}"),
        hl.Checkpointer(tmp_path, a_state()),
    ):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="No checkpoints can be written to"),
        hl.Checkpointer(tmp_path / "file", {}),
    ):
        pass


def test_reading_needs_no_right_to_write(tmp_path):
    with hl.Checkpointer(tmp_path, a_state(1.0)) as checkpointer:
        checkpointer.save(1)
        checkpointer.wait()
        assert hl.Checkpointer(tmp_path, a_state()).restore() == 1  # While another writes.


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "3"])
def test_keep_is_a_positive_number_or_none(tmp_path, keep):
    with pytest.raises(ValueError, match="keep= takes a positive whole number, or None to keep all; received"):
        hl.Checkpointer(tmp_path, {}, keep=keep)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)])
def test_a_step_is_a_number_of_steps(tmp_path, step, error):
    with pytest.raises(error), hl.Checkpointer(tmp_path, {}) as checkpointer:
        checkpointer.save(step)


def test_no_warning_comes_where_all_is_well(tmp_path):
    with warnings.catch_warnings(), hl.Checkpointer(tmp_path, a_state(), best="min:loss") as checkpointer:
        warnings.simplefilter("error")
        checkpointer.save(1)
        checkpointer.save(2, {"loss": float("nan")})
        assert checkpointer.restore() == 2
