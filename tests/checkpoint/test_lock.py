"""`WriterLock` gives a directory one writer until its process ends."""

import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from handloom.checkpoint.store import Store, read_newest
from handloom.errors import CheckpointError
from tests.checkpoint.common import draft, is_of, save
from tests.on_backends import ROOT

pytestmark = pytest.mark.once

# Takes the lock, then forks a child that outlives it, as a data loading worker may.
WRITER = """
import os, sys, time
from pathlib import Path
from handloom.checkpoint.store import Store
Store(Path(sys.argv[1])).open()
child = os.fork() if sys.argv[2] == "forks" else 0
if child or sys.argv[2] != "forks":
    print(child, flush=True)
time.sleep(60)
"""


def writer(directory, kind="alone"):
    """A process that writes to a directory, and the number of its child."""
    command = [sys.executable, "-c", WRITER, str(directory), kind]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_writer_lock_names_its_holder_and_ends_with_the_process(tmp_path):
    save(tmp_path, 1)
    process, _ = writer(tmp_path)
    try:
        words = f"is being written by process {process.pid} on '{platform.node()}'.*one writer at a time"
        with pytest.raises(CheckpointError, match=words):
            save(tmp_path, 2)
        assert is_of(read_newest(tmp_path)[0], 1)  # Reading needs no lock.
    finally:
        end(process)
    save(tmp_path, 2)
    assert is_of(read_newest(tmp_path)[0], 2)


def saved_in_the_end(directory, seconds=20):
    """Saves when a child has released the lock, which it does as soon as it runs: on a busy machine, not at once."""
    until = time.monotonic() + seconds
    while True:
        try:
            return save(directory, 1)
        except CheckpointError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def test_writer_lock_is_not_held_by_a_child_that_outlives_its_parent(tmp_path):
    process, child = writer(tmp_path, "forks")
    end(process)
    try:
        os.kill(child, 0)  # It is alive.
        saved_in_the_end(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_writer_lock_in_a_child_closes_no_other_file(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from handloom.checkpoint.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.open()\n"
        "if os.fork() == 0:\n"
        "    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]; store.close()\n"
        "    os._exit(sum(1 for file in files if not os.path.exists(f'/dev/fd/{file}')))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False).returncode == 0


def test_writer_lock_separates_two_writers_in_one_process(tmp_path):
    (tmp_path / ".lock").write_text("x" * 1000)  # Of an earlier process.
    first, second = Store(tmp_path), Store(tmp_path)
    first.save(draft(1))
    assert json.loads((tmp_path / ".lock").read_text()) == {"pid": os.getpid(), "host": platform.node()}
    with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()} on"):
        second.save(draft(2))
    first.close()
    second.save(draft(2))
    second.close()
    second.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1}', "null"])
def test_writer_lock_calls_a_holder_without_a_name_another_process(tmp_path, text):
    store = Store(tmp_path)
    store.open()
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(CheckpointError, match="is being written by another process"):
        Store(tmp_path).open()
    store.close()
