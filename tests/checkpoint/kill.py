"""Kills a process at each of its system calls during a save, and checks what is left.

This is a program of its own, because it forks hundreds of times, which is not safe in a process with a backend.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from handloom.checkpoint.store import read_newest
from tests.checkpoint.common import Nth, install, is_of, save


def killed_at(number, directory, step, keep, part=0.0):
    """Saves in a process that is killed at its n-th call, or in the middle of a write; returns whether it survived."""
    child = os.fork()
    if child == 0:
        install(Nth(number, lambda name, arguments: die(name, arguments, part)))
        save(directory, step, keep=keep)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"the process ended with {status}")
    return status == 0


def die(name, arguments, part):
    if name == "write":
        file, data = arguments
        os.write(file, data[: int(len(data) * part)])
    os.kill(os.getpid(), signal.SIGKILL)


def look(directory, before, new):
    """Checks that a reader finds the old checkpoint or the new one, intact, and no damaged one."""
    found, damaged = read_newest(directory)
    assert not damaged
    if found is None:
        assert before is None
    else:
        assert is_of(found, found.step)
        assert found.step in (before, new)
    return found


def go_on(directory, keep):
    """Checks that the next save works, and leaves no stray file."""
    save(directory, 9, keep=keep)
    found, damaged = read_newest(directory)
    assert is_of(found, 9)
    assert not damaged
    names = {path.name for path in directory.iterdir()}
    assert names <= {".lock", "step_000000001", "step_000000001_1", "step_000000002", "step_000000009"}
    assert keep != 1 or names == {".lock", "step_000000009"}


def sweep(before, new, keep, part=0.0, twice=False):
    """Kills at each call, until a save survives; the number of calls, and how many of them came after the commit."""
    number, committed, lived = 0, 0, False
    while not lived:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name) / "run"
            if before is not None:
                save(directory, before)
            if twice:  # After another process that was killed.
                killed_at(10, directory, new, keep)
            lived = killed_at(number, directory, new, keep, part)
            found = look(directory, before, new)
            committed += found is not None and (found.step, found.path.name[-2:]) != (before, "01")
            go_on(directory, keep)
        number += 1
    return number - 1, committed


if __name__ == "__main__":
    before, new, keep, part, twice = (eval(word) for word in sys.argv[1:])  # Our own words, from the test.
    print(*sweep(before, new, keep, part, twice))
