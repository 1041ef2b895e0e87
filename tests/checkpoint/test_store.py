"""Checkpoints in a directory: committed in order, safe against failures, read from the newest whole one."""

import errno
import os
import resource

import numpy as np
import pytest

from handloom.checkpoint import filesystem
from handloom.checkpoint.retention import Slot
from handloom.checkpoint.store import Store, read_newest, slots, valid_steps
from handloom.errors import CheckpointError
from tests.checkpoint.common import Nth, draft, draft_of, install, is_of, save

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _own_system():
    yield
    install(None)


def failing(code):
    def act(name, arguments):
        raise OSError(code, os.strerror(code))

    return act


def newest(directory):
    found, damaged = read_newest(directory)
    assert not damaged
    return found


def inside(directory):
    return {path.name for path in directory.iterdir()}


# ----------------------------------------------------------------------- order


def test_everything_is_on_the_disk_before_the_new_name_and_that_before_the_old_goes(tmp_path):
    """What a power cut could reorder is kept apart by fsync."""
    save(tmp_path, 1)
    log, opened = [], {}
    real = filesystem.os

    class Recorder:
        def __getattr__(self, name):
            found = getattr(real, name)
            if name == "open":

                def opening(path, flags, *rest, **keywords):
                    file = found(path, flags, *rest, **keywords)
                    opened[file] = os.path.basename(path)
                    return file

                return opening
            if name in ("write", "fsync", "rename", "unlink", "rmdir"):

                def call(first, *rest, **keywords):
                    log.append((name, opened.get(first, first) if isinstance(first, int) else os.path.basename(first)))
                    return found(first, *rest, **keywords)

                return call
            return found

    filesystem.os = Recorder()
    save(tmp_path, 2, keep=1)
    commit = log.index(("rename", ".writing"))
    for name in ("arrays.safetensors", "contents.json", "manifest.json"):
        last_write = max(index for index, entry in enumerate(log) if entry == ("write", name))
        assert last_write < log.index(("fsync", name)) < log.index(("fsync", ".writing")) < commit
    parent = log.index(("fsync", tmp_path.name), commit)
    removals = [index for index, (call, _) in enumerate(log) if call in ("unlink", "rmdir")]
    assert log[parent + 1] == ("rename", "step_000000001")
    assert min(removals) > parent


def test_the_name_of_a_new_directory_is_on_the_disk_too(tmp_path):
    log = []
    install(lambda name, arguments: log.append((name, *arguments[:1])))
    save(tmp_path / "run", 1)
    opened = log.index(("open", tmp_path))
    assert log[opened - 1] == ("makedirs", tmp_path / "run")
    assert log[opened + 1][0] == "fsync"


def test_a_checkpoint_that_does_not_read_back_is_not_committed(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = os.write

    class Forgetful:
        """A disk that loses a bit of each large write, and says nothing."""

        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, file, data):
            return real(file, bytes([data[0] ^ 1]) + bytes(data[1:]))

    monkeypatch.setattr(filesystem, "os", Forgetful())
    with pytest.raises(
        CheckpointError, match=r"step_000000002 was not written to .*reading it back.* is damaged.*still are"
    ):
        save(tmp_path, 2, keep=1)
    assert is_of(newest(tmp_path), 1)
    assert inside(tmp_path) == {".lock", "step_000000001"}


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(tmp_path):
    for step in (9, 10, 1_000_000_000):
        save(tmp_path, step)
    for age, slot in enumerate(slots(tmp_path)):
        os.utime(tmp_path / slot.name, (10**9 - 10**6 * age,) * 2)
    assert newest(tmp_path).step == 1_000_000_000
    save(tmp_path, 1_000_000_001, keep=2)
    assert valid_steps(tmp_path) == [1_000_000_000, 1_000_000_001]


def test_a_step_saved_again_replaces_the_one_before(tmp_path):
    save(tmp_path, 1)
    for value in (1.0, 2.0, 3.0):
        store = Store(tmp_path, keep=2)
        store.save(draft_of({"value": np.array(value)}, step=5))
        store.close()
    assert newest(tmp_path).arrays["value"] == 3.0
    assert inside(tmp_path) == {".lock", "step_000000001", "step_000000005_2"}


def test_a_step_before_one_that_is_there_is_refused(tmp_path):
    save(tmp_path, 100)
    with pytest.raises(CheckpointError, match=r"holds step_000000100, of a later step than 7\. Go on .* with restore"):
        save(tmp_path, 7)
    assert inside(tmp_path) == {".lock", "step_000000100"}


def test_damaged_checkpoints_are_passed_over_and_go_when_a_new_one_is_there(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_000000003" / "contents.json").unlink()
    store = Store(tmp_path, keep=2)
    found, damaged = read_newest(tmp_path)
    store.damaged |= damaged
    assert is_of(found, 2)
    assert list(damaged) == [Slot(3)]
    store.save(draft(2))
    store.close()
    assert valid_steps(tmp_path) == [1, 2]
    assert inside(tmp_path) == {".lock", "step_000000001", "step_000000002_1"}


def test_if_none_is_whole_that_is_an_error_that_names_them_all(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"step_00000000{step}" / "arrays.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole.*step_000000002.*step_000000001"):
        read_newest(tmp_path)


def test_a_directory_without_checkpoints_has_no_newest(tmp_path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_000000001").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert read_newest(tmp_path) == (None, {})
    assert read_newest(tmp_path / "nowhere") == (None, {})
    assert valid_steps(tmp_path) == []


def test_a_checkpoint_removed_by_its_writer_while_it_is_read_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    looked = []

    def meanwhile(manifest):
        if not looked.append(1) and len(looked) == 1:
            save(tmp_path, 2, keep=1)

    found, damaged = read_newest(tmp_path, meanwhile)
    assert is_of(found, 2)
    assert not damaged


# -------------------------------------------------------------------- failures


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_failure_of_any_call_keeps_the_old_checkpoint_and_leaves_nothing_behind(tmp_path, code):
    number, messages, done = 0, [], False
    while not done:
        directory = tmp_path / str(number)
        save(directory, 1)
        install(Nth(number, failing(code)))
        try:
            save(directory, 2, keep=1)
            done = True
        except CheckpointError as error:
            messages.append(str(error))
        install(None)
        assert newest(directory).step in (1, 2)
        save(directory, 3, keep=1)
        assert is_of(newest(directory), 3)
        assert inside(directory) == {".lock", "step_000000003"}
        number += 1
    assert len(messages) > 30
    assert all("written to" in message and str(tmp_path) in message for message in messages)


def test_a_full_disk_says_how_much_is_missing_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    needed = draft(2).bytes
    monkeypatch.setattr(filesystem, "free_bytes", lambda directory: needed - 123)
    with pytest.raises(CheckpointError, match=rf"123 bytes are missing.*needs {needed:,} bytes.*make room.*still are"):
        save(tmp_path, 2, keep=1)
    assert is_of(newest(tmp_path), 1)
    assert inside(tmp_path) == {".lock", "step_000000001"}


def test_what_a_checkpoint_is_said_to_need_is_what_it_takes(tmp_path):
    save(tmp_path, 1, metrics={"loss": 0.1})
    taken = sum(path.stat().st_size for path in (tmp_path / "step_000000001").iterdir())
    assert taken <= draft(1, {"loss": 0.1}).bytes <= taken + 8192


def test_a_limit_of_the_system_on_writing_is_met_like_a_full_disk(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(tmp_path, keep=1)
    large = draft_of({"large": np.zeros(1 << 20)}, step=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_000000002 was not written.*File too large.*make room"):
            store.save(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        store.close()
    assert is_of(newest(tmp_path), 1)
    assert inside(tmp_path) == {".lock", "step_000000001"}


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(filesystem.os, "access", lambda path, mode: False)  # For root, no directory is read-only.
    with pytest.raises(CheckpointError, match=r"No checkpoints can be written to .*: it is read-only\. Choose another"):
        Store(tmp_path).open()
    assert is_of(newest(tmp_path), 1)


def test_a_file_where_the_directory_should_be_is_an_error(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match=r"No checkpoints can be written to .*run: File exists"):
        Store(tmp_path / "run").open()
    assert (tmp_path / "run").read_text() == "mine"
