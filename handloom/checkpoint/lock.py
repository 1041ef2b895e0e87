"""One writer for a directory, by a lock that the system releases when its process ends."""

import contextlib
import importlib
import json
import os
import platform
import stat
from pathlib import Path
from typing import Any

from handloom.checkpoint.filesystem import fcntl
from handloom.errors import CheckpointError

_FAR = 1 << 30  # Windows locks bytes of a file, also for readers: this byte is beyond the name of the holder.

_held: set[int] = set()


class WriterLock:
    """The right to write to a directory, held until `release` or the end of the process.

    Args:
        directory: The directory, which exists.

    Raises:
        CheckpointError: Another writer holds the lock; the message names its process and host.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / ".lock"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._take(path)
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self._file)

    def _take(self, path: Path) -> None:
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:  # Writing to it could change another file.
            raise CheckpointError(f"HL521: {path} is not a regular file, or has a hard link.", fix="Remove it.")
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError):
            raise CheckpointError(
                f"HL522: {path.parent} is being written by {self._holder()}.",
                "A directory of checkpoints takes one writer at a time.",
                "End that process, or choose another directory.",
            ) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())

    def _holder(self) -> str:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # The holder may be writing its name just now.
            found = json.loads(os.read(self._file, 4096))
            return f"process {int(found['pid'])} on {found['host']!r:.80}"
        return "another process"

    def release(self) -> None:
        """Lets another process write."""
        if self._file in _held:  # Not so in a forked child, where this number may belong to another file.
            _held.discard(self._file)
            os.close(self._file)


def _lock(file: int) -> None:
    """Locks a file until it is closed, however its process ends; raises `OSError` if it is locked already."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    msvcrt: Any = importlib.import_module("msvcrt")
    os.lseek(file, _FAR, os.SEEK_SET)
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(file, 0, os.SEEK_SET)


def _close_in_child() -> None:
    """Closes the locks in a forked child, such as a data loading worker, which would hold them after its parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
