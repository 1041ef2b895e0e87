"""`Store` commits checkpoints in order and survives failures; `read_newest` reads the newest complete one."""

import errno
import os

import numpy as np
import pytest

from handloom.checkpoint import filesystem
from handloom.checkpoint.store import Store, read_newest, slots, valid_steps
from handloom.errors import CheckpointError
from tests.checkpoint.common import FILES, Nth, Shim, draft, draft_of, failing, flip, install, is_of, save

pytestmark = pytest.mark.once


def newest(directory):
    found, damaged = read_newest(directory)
    assert not damaged
    return found


def inside(directory):
    return {path.name for path in directory.iterdir()}


# ----------------------------------------------------------------------- order


class Recorder(Shim):
    """Lists calls with the names of the files that they act on."""

    def __init__(self):
        self.log, self._opened = [], {}

    def _call(self, function, *arguments, **keywords):
        result = function(*arguments, **keywords)
        if function.__name__ == "open":
            self._opened[result] = os.path.basename(arguments[0])
        on = self._opened.get(arguments[0], arguments[0])
        self.log.append((function.__name__, os.path.basename(on)))
        return result


def test_store_flushes_everything_before_the_rename_and_that_before_removals(tmp_path, monkeypatch):
    """A power cut may reorder calls with no fsync in between."""
    save(tmp_path / "run", 1)
    recorder = Recorder()
    monkeypatch.setattr(filesystem, "os", recorder)
    save(tmp_path / "run", 2, keep=1)
    log = recorder.log
    commit = log.index(("rename", ".writing"))
    for name in FILES:
        last_write = max(index for index, entry in enumerate(log) if entry == ("write", name))
        assert last_write < log.index(("fsync", name)) < log.index(("fsync", ".writing")) < commit
    flushed = log.index(("fsync", "run"), commit)
    assert log[flushed + 1] == ("rename", "step_000000001")
    assert min(index for index, (call, _) in enumerate(log) if call in ("unlink", "rmdir")) > flushed


def test_store_flushes_the_name_of_a_new_directory(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(filesystem, "os", recorder)
    save(tmp_path / "run", 1)
    assert recorder.log[:3] == [("makedirs", "run"), ("open", tmp_path.name), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("name", FILES)
def test_store_does_not_commit_a_checkpoint_that_does_not_read_back(tmp_path, name):
    """On a disk that silently flips one bit of one file."""
    save(tmp_path, 1)

    def turn(call, arguments):
        path = tmp_path / ".writing" / name
        if call == "fsync" and path.exists() and os.path.samestat(os.fstat(arguments[0]), path.stat()):
            flip(path)

    install(turn)
    words = rf"step_000000002 was not written to .*reading it back failed.*{name}.* is damaged.*are intact.*HL540"
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, 2, keep=1)
    assert is_of(newest(tmp_path), 1)
    assert inside(tmp_path) == {".lock", "step_000000001"}


def test_read_newest_goes_by_the_step_and_not_by_the_clock(tmp_path):
    for step in (9, 10, 1_000_000_000):
        save(tmp_path, step)
    for age, slot in enumerate(slots(tmp_path)):
        os.utime(tmp_path / slot.name, (10**9 - 10**6 * age,) * 2)
    assert newest(tmp_path).step == 1_000_000_000
    save(tmp_path, 1_000_000_001, keep=2)
    assert valid_steps(tmp_path) == [1_000_000_000, 1_000_000_001]


def test_store_replaces_a_step_that_is_saved_again(tmp_path):
    save(tmp_path, 1)
    for value in (1.0, 2.0, 3.0):
        store = Store(tmp_path, keep=2)
        store.save(draft_of({"value": np.array(value)}, step=5))
        store.close()
    assert newest(tmp_path).arrays["value"] == 3.0
    assert inside(tmp_path) == {".lock", "step_000000001", "step_000000005_2"}


def test_read_newest_finds_none_in_a_directory_without_checkpoints(tmp_path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_000000001").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert read_newest(tmp_path) == (None, {})
    assert read_newest(tmp_path / "nowhere") == (None, {})
    assert valid_steps(tmp_path) == []


def test_read_newest_moves_on_when_a_writer_removes_the_checkpoint(tmp_path):
    save(tmp_path, 1)
    found, damaged = read_newest(tmp_path, lambda manifest: manifest.step == 1 and save(tmp_path, 2, keep=1))
    assert is_of(found, 2)
    assert not damaged


# -------------------------------------------------------------------- failures


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_store_keeps_the_old_checkpoint_if_any_call_fails(tmp_path, code):
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
    assert {message[-6:] for message in messages} == {"HL537]", "HL539]", "HL540]", "HL556]"}


def test_store_on_a_full_disk_says_how_much_is_missing_before_it_writes(tmp_path, monkeypatch):
    save(tmp_path, 1, metrics={"loss": 0.1})
    taken = sum(path.stat().st_size for path in (tmp_path / "step_000000001").iterdir())
    needed = draft(2, {"loss": 0.1}).bytes
    assert taken <= needed <= taken + 8192
    monkeypatch.setattr(filesystem, "free_bytes", lambda directory: needed - 123)
    with pytest.raises(CheckpointError, match=rf"123 bytes are missing.*are intact.*needs {needed:,} bytes.*HL539"):
        save(tmp_path, 2, metrics={"loss": 0.1}, keep=1)
    assert is_of(newest(tmp_path), 1)
    assert inside(tmp_path) == {".lock", "step_000000001"}


def test_store_opens_only_a_directory_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file: File exists\. Choose another"):
        Store(tmp_path / "file").open()
    monkeypatch.setattr(filesystem.os, "access", lambda path, mode: False)  # For root, no directory is read-only.
    with pytest.raises(CheckpointError, match=r"cannot be written to .*: it is read-only\. Choose another"):
        Store(tmp_path).open()
