"""`fit` in processes with a limit on the disk, a second writer, and a clock that goes backwards."""

import json
import os
import platform
import re
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest

import handloom as hl
from tests.resume.processes import Child, to_the_end

# Disks are the same on every backend; test_kills.py shows on each that a run resumes.
pytestmark = pytest.mark.once

KIND = "step"
STEPS = 18


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its directory and its result."""
    directory = tmp_path_factory.mktemp("whole")
    child = run(directory)
    assert child.end() == 0, child.output
    return directory / "run", result(directory)


def run(directory, function=to_the_end):
    return Child(function, KIND, directory / "run", 3, directory / "result.json", output=directory / "output")


def result(directory):
    return json.loads((directory / "result.json").read_text(encoding="utf-8"))


def steps(child):
    return [word for word, _ in child.told].count("step")


def saved(directory):
    return hl.Checkpointer(directory / "run" / "checkpoints", {}).steps


def assert_resumes_bitwise(directory, whole):
    """Resumes a run, which must begin at the newest checkpoint."""
    *_, newest = saved(directory)
    again = run(directory)
    assert again.end() == 0, again.output
    assert steps(again) == STEPS - newest
    assert result(directory) == whole[1]


# ------------------------------------------------------------------------- disks


def to_the_end_with_less_room(kind, run_dir, keep, result, tell):
    """Trains; after the first checkpoint, no file may exceed so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def telling(word):
        tell(word)
        if word == "saved":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    try:
        to_the_end(kind, run_dir, keep, result, telling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fit_treats_a_limit_on_the_size_of_files_like_a_full_disk(whole, tmp_path):
    child = run(tmp_path, to_the_end_with_less_room)
    assert child.end() == 1
    assert 6 <= steps(child) <= 9
    assert re.search(r"of step 6 failed.* File too large.* Free space on the disk, or raise your limits", child.output)
    assert saved(tmp_path) == [3]
    assert_resumes_bitwise(tmp_path, whole)


def to_the_end_as_nobody(kind, run_dir, keep, result, tell):
    """Trains without the rights of root, who may write to any directory."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    to_the_end(kind, run_dir, keep, result, tell)


def test_fit_in_a_directory_without_permission_is_an_error_before_training():
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "run").mkdir()
        (directory / "run").chmod(0o555)
        directory.chmod(0o755)
        child = run(directory, to_the_end_as_nobody)
        assert child.end() == 1
        assert steps(child) == 0
        path = directory / "run" / "checkpoints"
        assert f"Checkpoints cannot be written to {path}: Permission denied." in child.output
        assert list((directory / "run").iterdir()) == []


# ------------------------------------------------------------------- two writers


def test_fit_refuses_a_second_process_until_the_first_is_killed(whole, tmp_path):
    first = run(tmp_path)
    assert "saved" in first.words()
    os.kill(first.pid, signal.SIGSTOP)
    second = run(tmp_path)
    assert second.end() == 1
    assert steps(second) == 0
    assert f"is being written by process {first.pid} on '{platform.node()}'" in second.output
    first.kill()
    assert first.end() == -signal.SIGKILL
    assert_resumes_bitwise(tmp_path, whole)


# ------------------------------------------------------------------------- clock


def to_the_end_while_the_clock_goes_backwards(kind, run_dir, keep, result, tell):
    now = time.time()
    time.time = iter(now - number for number in range(10**9)).__next__
    to_the_end(kind, run_dir, keep, result, tell)


def test_fit_resumes_from_the_last_step_while_the_clock_goes_backwards(whole, tmp_path):
    child = run(tmp_path, to_the_end_while_the_clock_goes_backwards)
    for _ in range(3):
        assert "saved" in child.words()
    child.kill()
    assert child.end() == -signal.SIGKILL
    for age, step in enumerate(saved(tmp_path)):  # The later the step, the older the files.
        for path in (tmp_path / "run" / "checkpoints").glob(f"step_{step:09d}*"):
            for found in (path, *path.iterdir()):
                os.utime(found, 2 * (time.time() - 10**6 * (age + 1),))
    assert len(saved(tmp_path)) > 1
    assert_resumes_bitwise(tmp_path, whole)
