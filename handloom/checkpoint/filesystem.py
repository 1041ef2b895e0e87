"""The calls of the operating system that a checkpoint is made of: here and nowhere else, so that tests see each one."""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from handloom.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None

_CHUNK = 1 << 20  # What is hashed just before or after is still in the processor's cache.
# Those a system has not are not needed on it. Every file that Python opens is closed in a process begun from it.
_BINARY, _DIRECTORY, _NOFOLLOW, _NONBLOCK = (
    getattr(os, name, 0) for name in ("O_BINARY", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK")
)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[int]:
    """A new file to write to, on the disk when the block is left without an error."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        yield file
        os.fsync(file)
    finally:
        os.close(file)


def chunks(data: memoryview) -> Iterator[memoryview]:
    """The same bytes in pieces."""
    for begin in range(0, len(data), _CHUNK):
        yield data[begin : begin + _CHUNK]


def write(file: int, data: memoryview) -> None:
    """Writes all of it, in as many calls as the system takes."""
    while data:
        data = data[os.write(file, data) :]


@contextlib.contextmanager
def reading(directory: Path, name: str) -> Iterator[tuple[int, int]]:
    """A file of a checkpoint and its size in bytes: a regular one with one name, reached through no link.

    A file with a second name could be changed by whoever has that name after it has been checked. None that we write
    has one.
    """
    try:
        with _beneath(directory) as (where, folder):
            # Not blocking, or a pipe of that name would have us wait for ever.
            file = os.open(where / name, os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _BINARY, dir_fd=folder)
    except OSError as error:
        raise CheckpointError("HL507", _unreadable(directory, name, error)) from error
    try:
        found = os.fstat(file)
        _check_ordinary(directory / name, found)
        yield file, found.st_size
    except OSError as error:
        raise CheckpointError(f"HL508: {directory / name} cannot be read: {error.strerror}.") from error
    finally:
        os.close(file)


@contextlib.contextmanager
def _beneath(directory: Path) -> Iterator[tuple[Path, int | None]]:
    """A directory that is no link, and what names in it are relative to: `dir_fd=`, where a system has that."""
    if os.path.islink(directory):
        raise OSError(errno.ELOOP, "it is a symbolic link", str(directory))
    if os.open not in os.supports_dir_fd:
        yield directory, None
        return
    folder = os.open(directory, os.O_RDONLY | _DIRECTORY | _NOFOLLOW)
    try:
        yield Path(), folder
    finally:
        os.close(folder)


def _unreadable(directory: Path, name: str, error: OSError) -> str:
    for path, cure in ((directory, "Give the path it points to"), (directory / name, "Put a copy in its place")):
        if os.path.islink(path):
            return f"{path} is a symbolic link; none is followed in a checkpoint. {cure}."
    return f"{directory / name} cannot be opened: {error.strerror}."


def _check_ordinary(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"HL509: {path} is no regular file.")
    if found.st_nlink != 1:
        raise CheckpointError(
            f"HL510: {path} is one of {found.st_nlink} names (hard links) of the same file; a file of a checkpoint has one. "
            "Make a copy of the checkpoint and use that.",
        )


class Reader:
    """Reads a file once, from its first byte to its last.

    Args:
        file: One of which nothing has been read yet.
        size: Its bytes.
        from_disk: Whether to read it past the memory of the system, which holds what was just written whatever the disk
            holds, if the system can. That also saves nine tenths of the processor's time, which the steps want.
    """

    def __init__(self, file: int, size: int, *, from_disk: bool = False) -> None:
        if from_disk:
            _past_cache(file)
        self._file, self._left = io.FileIO(file, closefd=False), size
        self._block = memoryview(mmap.mmap(-1, _CHUNK))  # Begins a page, as reading past the cache asks.
        self._read = self._block[:0]

    def take(self, count: int) -> Iterator[memoryview]:
        """So many bytes more, piece by piece; fewer if the file ends. Each piece is valid until the next."""
        while count > 0 and (self._read or self._next()):
            piece, self._read = self._read[:count], self._read[count:]
            count -= len(piece)
            yield piece

    def _next(self) -> bool:
        # Never past the end, of which a system may not let us read past its cache.
        found = self._file.readinto(self._block) if self._left > 0 else 0
        self._read, self._left = self._block[:found], self._left - found
        return found > 0


def _past_cache(file: int) -> None:
    if fcntl is not None and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # Not on every file system.
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
            return
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def names(directory: Path) -> list[str]:
    """The directories in a directory, links to some left out; none if it is not there."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def prepare(directory: Path) -> None:
    """Makes a directory with those above it, and makes sure that it can be written to."""
    if not directory.is_dir():
        os.makedirs(directory, exist_ok=True)
        sync(directory.absolute().parent)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(13, "it is read-only", str(directory))


def make(directory: Path) -> None:
    """Makes one directory."""
    os.mkdir(directory)


def rename(old: Path, new: Path) -> None:
    """Gives a directory another name, at once and whole."""
    os.rename(old, new)


def sync(directory: Path) -> None:
    """Puts the names in a directory on the disk, where a system lets a directory be opened for that."""
    if not _DIRECTORY:
        return
    folder = os.open(directory, os.O_RDONLY | _DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(directory: Path) -> None:
    """Removes a directory and the files in it, through no link."""
    with _beneath(directory) as (where, folder):
        for name in os.listdir(directory if folder is None else folder):
            os.unlink(where / name, dir_fd=folder)
    os.rmdir(directory)


def lower_priority() -> None:
    """Has the calling thread run where others leave it room. On Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        os.nice(10)


def free_bytes(directory: Path) -> int:
    """What a user may still write on the disk of a directory."""
    return shutil.disk_usage(directory).free
