"""Runs in processes that meet a full disk, a read-only one, each other, and a clock that goes back."""

import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import handloom as hl
from tests.resume.processes import Child, to_the_end

# What a process meets on a disk is the same on every backend; that a run goes on, test_kills shows on each.
pytestmark = pytest.mark.once

KIND = "step"
STEPS = 18
IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing befell: its directory, and what is left of it."""
    directory = tmp_path_factory.mktemp("whole")
    child = run(directory)
    assert child.end() == 0, child.output
    return directory / "run", left(directory)


def run(directory, function=to_the_end):
    return Child(function, KIND, directory / "run", 3, directory / "result.json", output=directory / "output")


def left(directory):
    return json.loads((directory / "result.json").read_text(encoding="utf-8"))


def steps(child):
    return [word for word, _ in child.told].count("step")


def saved(directory):
    return hl.Checkpointer(directory / "run" / "checkpoints", {}).steps


def assert_goes_on_to_the_same_bits(directory, whole):
    """From its newest checkpoint, and no earlier one."""
    *_, newest = saved(directory)
    again = run(directory)
    assert again.end() == 0, again.output
    assert steps(again) == STEPS - newest
    assert left(directory) == whole[1]


# ------------------------------------------------------------------------- disks


def room_for_one(run_dir):
    """The bytes that a disk of pages needs for one and a half of a run's checkpoints, and for its log and lock."""
    page, *_, newest = resource.getpagesize(), *sorted((run_dir / "checkpoints").glob("step_*"))
    pages = [-(-path.stat().st_size // page) for path in newest.iterdir()]
    return page * (sum(pages) * 3 // 2 + 2)


# It takes some seconds: a program of its own, in which the run compiles its steps three times.
def test_on_a_disk_that_is_full_then_has_room_then_is_read_only(whole, tmp_path):
    disk, aside = tmp_path / "disk", tmp_path / "aside"
    disk.mkdir()
    aside.mkdir()
    trial = [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "trial", disk]
    if not shutil.which("unshare") or subprocess.run(trial, check=False).returncode:
        pytest.skip("no disk can be mounted here; the next test is of a limit that acts like a full one")
    program = [sys.executable, "-m", "tests.resume.small_disk", disk, aside, str(room_for_one(whole[0]))]
    root, alone = Path(__file__).parents[2], os.environ.copy()
    alone.pop("JAX_COMPILATION_CACHE_DIR")  # What these processes compile they compile themselves, as users' do.
    done = subprocess.run(
        [*IN_A_NAMESPACE, *program], cwd=root, env=alone, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert_failed_and_said_how_much_is_missing(found["full"])
    assert_went_on_to_the_same_bits(found["with room"], whole)
    assert_failed_before_training_began(found["read-only"])


def assert_failed_and_said_how_much_is_missing(full):
    assert full["code"] == 1
    assert 6 <= full["steps"] <= 9  # It could not save after six steps; it would have saved again after nine.
    words = (
        r"CheckpointError: Saving the checkpoint of step 6 failed.* ([\d,]+) bytes are missing.* needs ([\d,]+) bytes"
    )
    missing, needed = (int(number.replace(",", "")) for number in re.search(words, full["output"]).groups())
    assert 0 < missing < needed
    assert full["saved"] == [3]


def assert_went_on_to_the_same_bits(with_room, whole):
    assert with_room["code"] == 0, with_room["output"]
    assert with_room["steps"] == STEPS - 3
    assert with_room["left"] == whole[1]  # In a process whose hashes of words are others, besides.


def assert_failed_before_training_began(found):
    assert found["code"] == 1
    assert found["steps"] == 0
    assert "CheckpointError: No checkpoints can be written to" in found["output"]
    assert "Read-only file system. Choose another directory" in found["output"]


def to_the_end_with_less_room(kind, run_dir, keep, result, tell):
    """As `to_the_end`; after the first checkpoint no file may have more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def telling(word):
        tell(word)
        if word == "saved":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    try:
        to_the_end(kind, run_dir, keep, result, telling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_what_may_be_written_is_met_like_a_full_disk(whole, tmp_path):
    child = run(tmp_path, to_the_end_with_less_room)
    assert child.end() == 1
    assert 6 <= steps(child) <= 9
    assert re.search(r"of step 6 failed.* File too large.* It needs [\d,]+ bytes.* make room", child.output)
    assert saved(tmp_path) == [3]
    assert_goes_on_to_the_same_bits(tmp_path, whole)


def to_the_end_as_nobody(kind, run_dir, keep, result, tell):
    """As `to_the_end`, without the rights that root has everywhere."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    to_the_end(kind, run_dir, keep, result, tell)


def test_a_directory_that_may_not_be_written_is_an_error_before_training_begins():
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "run").mkdir()
        (directory / "run").chmod(0o555)
        directory.chmod(0o755)
        child = run(directory, to_the_end_as_nobody)
        assert child.end() == 1
        assert steps(child) == 0
        assert (
            f"No checkpoints can be written to {directory / 'run' / 'checkpoints'}: Permission denied." in child.output
        )
        assert list((directory / "run").iterdir()) == []


# ------------------------------------------------------------------- two writers


def test_a_second_process_is_refused_until_the_first_is_killed(whole, tmp_path):
    first = run(tmp_path)
    assert "saved" in first.words()
    os.kill(first.pid, signal.SIGSTOP)
    second = run(tmp_path)
    assert second.end() == 1
    assert steps(second) == 0
    assert f"is being written by process {first.pid} on '{platform.node()}'" in second.output
    first.kill()
    assert first.end() == -signal.SIGKILL
    assert_goes_on_to_the_same_bits(tmp_path, whole)


# ------------------------------------------------------------------------- clock


def to_the_end_while_time_goes_back(kind, run_dir, keep, result, tell):
    now = time.time()
    time.time = iter(now - number for number in range(10**9)).__next__
    to_the_end(kind, run_dir, keep, result, tell)


def test_the_newest_is_that_of_the_last_step_while_the_clock_goes_back(whole, tmp_path):
    child = run(tmp_path, to_the_end_while_time_goes_back)
    for _ in range(3):
        assert "saved" in child.words()
    child.kill()
    assert child.end() == -signal.SIGKILL
    for age, step in enumerate(saved(tmp_path)):  # The later the step, the older the files.
        for path in (tmp_path / "run" / "checkpoints").glob(f"step_{step:09d}*"):
            for found in (path, *path.iterdir()):
                os.utime(found, 2 * (time.time() - 10**6 * (age + 1),))
    assert len(saved(tmp_path)) > 1
    assert_goes_on_to_the_same_bits(tmp_path, whole)
