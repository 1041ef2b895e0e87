"""One writer for a directory; a dead one is none."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handloom.checkpoint.store import Store, read_newest
from handloom.errors import CheckpointError
from tests.checkpoint.common import draft, is_of, save

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
# Takes the lock, then forks: what the child does with it (a worker that loads data, say) is nobody's business.
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


def test_the_second_writer_is_told_who_the_first_is_and_a_killed_one_holds_nothing(tmp_path):
    save(tmp_path, 1)
    process, _ = writer(tmp_path)
    try:
        words = f"is being written by process {process.pid} on '{platform.node()}'. One process at a time"
        with pytest.raises(CheckpointError, match=words):
            save(tmp_path, 2)
        assert is_of(read_newest(tmp_path)[0], 1)  # Reading needs no lock.
    finally:
        end(process)
    save(tmp_path, 2)
    assert is_of(read_newest(tmp_path)[0], 2)


def saved_in_the_end(directory, seconds=20):
    """The child lets go as soon as it runs, which on a busy machine is not at once."""
    until = time.monotonic() + seconds
    while True:
        try:
            return save(directory, 1)
        except CheckpointError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def test_a_child_that_outlives_a_killed_writer_does_not_hold_its_lock(tmp_path):
    process, child = writer(tmp_path, "forks")
    end(process)
    try:
        os.kill(child, 0)  # It lives.
        saved_in_the_end(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_closes_no_file_that_is_not_its_own(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from handloom.checkpoint.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.open()\n"
        "if os.fork() == 0:\n"
        "    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]; store.close()\n"
        "    os._exit(sum(1 for file in files if not os.path.exists(f'/dev/fd/{file}')))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False).returncode == 0


def test_two_writers_in_one_process_are_two(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.save(draft(1))
    with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()} on"):
        second.save(draft(2))
    first.close()
    second.save(draft(2))
    second.close()
    second.close()


def test_the_lock_names_its_holder(tmp_path):
    (tmp_path / ".lock").write_text("x" * 1000)  # Of an older process, whatever it wrote.
    store = Store(tmp_path)
    store.open()
    assert json.loads((tmp_path / ".lock").read_text()) == {"pid": os.getpid(), "host": platform.node()}
    store.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1}', "null"])
def test_a_holder_that_did_not_give_its_name_is_another_process(tmp_path, text):
    store = Store(tmp_path)
    store.open()
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(CheckpointError, match="is being written by another process"):
        Store(tmp_path).open()
    store.close()
