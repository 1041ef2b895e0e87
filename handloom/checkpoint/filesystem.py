"""The calls of the operating system that a checkpoint is made of: here and nowhere else, so that tests see each one."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from handloom.errors import CheckpointError

_CHUNK = 1 << 20  # What is hashed just before or after is still in the processor's cache.


@contextlib.contextmanager
def creating(path: Path) -> Iterator[int]:
    """A new file to write to, on the disk when the block is left without an error."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
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
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Not blocking, or a pipe of that name would have us wait for ever.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError("HL507", _unreadable(directory, name, error)) from error
    try:
        found = os.fstat(file)
        _check_ordinary(directory / name, found)
        yield file, found.st_size
    except OSError as error:
        raise CheckpointError("HL508", f"{directory / name} cannot be read: {error.strerror}.") from error
    finally:
        os.close(file)


def _unreadable(directory: Path, name: str, error: OSError) -> str:
    for path, cure in ((directory, "Give the path it points to"), (directory / name, "Put a copy in its place")):
        if os.path.islink(path):
            return f"{path} is a symbolic link; none is followed in a checkpoint. {cure}."
    return f"{directory / name} cannot be opened: {error.strerror}."


def _check_ordinary(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("HL509", f"{path} is no regular file.")
    if found.st_nlink != 1:
        raise CheckpointError(
            "HL510",
            f"{path} is one of {found.st_nlink} names (hard links) of the same file; a file of a checkpoint has one. "
            "Make a copy of the checkpoint and use that.",
        )


def fill(file: int, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file ends; the number of bytes read."""
    done = 0
    while done < len(buffer) and (count := os.readv(file, [buffer[done : done + _CHUNK]])):
        done += count
    return done


def differing(file: int, size: int, parts: Mapping[str, memoryview]) -> list[str]:
    """The names of the parts that a file on the disk does not hold, one after the other from its first byte on.

    Args:
        file: One of which nothing has been read yet.
        size: Its bytes.
        parts: Name to bytes.
    """
    blocks, rest = _on_disk(file, size), np.empty(0, np.uint8)
    wrong: list[str] = []
    for name, data in parts.items():
        at = 0
        while at < len(data):
            rest = rest if rest.size else next(blocks, rest)
            if not rest.size:  # The file is over.
                wrong.append(name)
                break
            piece = data[at : at + rest.size]
            if not np.array_equal(rest[: len(piece)], piece):
                wrong.append(name)
            at, rest = at + len(piece), rest[len(piece) :]
    return list(dict.fromkeys(wrong))


def _on_disk(file: int, size: int) -> Iterator[np.ndarray]:
    """The bytes of a file in blocks, each in the same memory.

    Not by `fill`, which asks once more where the file ends: past the cache, a system may refuse to read from there.
    """
    _past_cache(file)
    block = np.frombuffer(mmap.mmap(-1, _CHUNK), np.uint8)  # Begins a page of memory, as reading past the cache asks.
    while size > 0 and (count := os.readv(file, [block.data])):
        size -= count
        yield block[:count]


def _past_cache(file: int) -> None:
    """Has a file read from the disk, and not from memory, which holds what was just written whatever the disk holds.

    Where the system can, nothing is put into its cache then either. That saves nine tenths of the processor's time,
    which the steps want.
    """
    if hasattr(os, "O_DIRECT"):
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
    """Puts the names in a directory on the disk."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(directory: Path) -> None:
    """Removes a directory and the files in it, through no link."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(folder):
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(directory)


def lower_priority() -> None:
    """Has the calling thread run where others leave it room. On Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        os.nice(10)


def free_bytes(directory: Path) -> int:
    """What a user may still write on the disk of a directory."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
