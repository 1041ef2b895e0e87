"""One writer for a directory, by a lock that a dead process does not hold."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import stat
from pathlib import Path
from typing import Any

from handloom.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None

_FAR = 1 << 30  # Of a file, Windows locks bytes, also for readers: one that is not among those that name the holder.

_held: set[int] = set()


class WriterLock:
    """The right to write into a directory, held until `release` or the end of the process.

    Args:
        directory: The directory, which exists.

    Raises:
        CheckpointError: Another has it; names process and host.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / ".lock"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._take(directory)
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self._file)

    def _take(self, directory: Path) -> None:
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:  # What is behind another name is not ours to write.
            raise CheckpointError(f"HL521: {directory / '.lock'} is no regular file, or has a second name. Remove it.")
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError):
            raise CheckpointError(
                f"HL522: {directory} is being written by {self._holder()}. "
                "One process at a time writes to a directory: end that one, or choose another directory.",
            ) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())

    def _holder(self) -> str:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # It may just be writing its name.
            found = json.loads(os.read(self._file, 4096))
            return f"process {int(found['pid'])} on {found['host']!r:.80}"
        return "another process"

    def release(self) -> None:
        """Lets another write."""
        if self._file in _held:  # In a child it is not, and its number may be that of another file.
            _held.discard(self._file)
            os.close(self._file)


def _lock(file: int) -> None:
    """Locks a file until it is closed, by whatever end of the process; an OSError if it is locked already."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    msvcrt: Any = importlib.import_module("msvcrt")
    os.lseek(file, _FAR, os.SEEK_SET)
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(file, 0, os.SEEK_SET)


def _let_go() -> None:
    """A child shares the lock and would hold it after its parent's death: a worker that loads data, for one."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
