"""The system calls that checkpoints are made of, all in this module, so that tests can watch each of them."""

import contextlib
import errno
import io
import mmap
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from handloom.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None

CHUNK = 1 << 20  # Bytes. A chunk is still in the processor's cache when it is hashed just before or after.
# A flag that a system lacks is not needed there. No file stays open in a child process: Python sets close-on-exec.
_BINARY, _DIRECTORY, _NOFOLLOW, _NONBLOCK = (
    getattr(os, name, 0) for name in ("O_BINARY", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK")
)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[int]:
    """Opens a new file for writing; flushes it to disk when the block ends without an error."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        yield file
        _flush(file)
    finally:
        os.close(file)


def _flush(file: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # On macOS, `fsync` leaves the data in the cache of the disk.
        with contextlib.suppress(OSError):  # Some file systems do not support it.
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def write(file: int, data: bytes | memoryview) -> None:
    """Writes all of the data, in as many calls as the system needs."""
    data = memoryview(data)
    while data:
        data = data[os.write(file, data) :]


@contextlib.contextmanager
def reading(directory: Path, name: str, *, from_disk: bool = False) -> "Iterator[Reader]":
    """Opens a file of a checkpoint: a regular file with one name, reached through no link.

    A file with a second name could change after the check. Handloom never writes one.
    """
    for path in (directory, directory / name):
        if os.path.islink(path):
            raise CheckpointError(
                f"HL507: {path} is a symbolic link; links in checkpoints are not followed.",
                fix=f"Use the path {os.path.realpath(path)}." if path == directory else "Replace it with a copy.",
            )
    try:
        with _beneath(directory) as (where, folder):
            # Non-blocking: opening a pipe of that name would wait forever.
            file = os.open(where / name, os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _BINARY, dir_fd=folder)
    except OSError as error:
        raise CheckpointError(f"HL555: {directory / name} cannot be opened: {error.strerror}.") from error
    try:
        found = os.fstat(file)
        _check_ordinary(directory / name, found)
        yield Reader(file, found.st_size, from_disk=from_disk)
    except OSError as error:
        raise CheckpointError(f"HL508: {directory / name} cannot be read: {error.strerror}.") from error
    finally:
        os.close(file)


@contextlib.contextmanager
def _beneath(directory: Path) -> Iterator[tuple[Path, int | None]]:
    """A directory that is not a link; yields the base of names in it and `dir_fd=`, where the system has that."""
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


def _check_ordinary(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"HL509: {path} is not a regular file.")
    if found.st_nlink != 1:
        raise CheckpointError(
            f"HL510: {path} is one of {found.st_nlink} names (hard links) of a file; files of a checkpoint have one.",
            fix="Copy the checkpoint and use the copy.",
        )


class Reader:
    """Reads a file once, from its first byte to its last.

    Args:
        file: An open file, at its beginning.
        size: Its size in bytes.
        from_disk: Whether to bypass the page cache of the system, if possible. The cache holds the bytes just written,
            even if the disk does not. Bypassing it also saves nine tenths of the processor time, which steps need.

    Attributes:
        size: Its size in bytes.
    """

    def __init__(self, file: int, size: int, *, from_disk: bool) -> None:
        if from_disk:
            _bypass_cache(file)
        self._file, self.size, self._left = io.FileIO(file, closefd=False), size, size
        self._block = memoryview(mmap.mmap(-1, CHUNK))  # Aligned to a page, as reads past the cache require.
        self._unread = self._block[:0]

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer if the file ends."""
        return b"".join(map(bytes, self.take(count)))

    def take(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes in chunks; fewer if the file ends. A chunk is valid until the next one."""
        while count > 0 and (self._unread or self._fill()):
            chunk, self._unread = self._unread[:count], self._unread[count:]
            count -= len(chunk)
            yield chunk

    def _fill(self) -> bool:
        # Never past the end: a system may refuse to read there past its cache.
        found = self._file.readinto(self._block) if self._left > 0 else 0
        self._unread, self._left = self._block[:found], self._left - found
        return found > 0


def _bypass_cache(file: int) -> None:
    if fcntl is not None and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # Some file systems do not support it.
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
            return
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def names(directory: Path) -> list[str]:
    """The names of the directories in a directory, without links; none if it does not exist."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def prepare(directory: Path) -> None:
    """Creates a directory and its parents, and checks that it is writable."""
    if not directory.is_dir():
        os.makedirs(directory, exist_ok=True)
        sync(directory.absolute().parent)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it is read-only", str(directory))


def make(directory: Path) -> None:
    """Creates one directory."""
    os.mkdir(directory)


def rename(old: Path, new: Path) -> None:
    """Renames a directory in one atomic operation."""
    _patiently(os.rename, old, new)


def sync(directory: Path) -> None:
    """Flushes the names in a directory to disk, where the system can open a directory."""
    if not _DIRECTORY:
        return
    folder = os.open(directory, os.O_RDONLY | _DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(directory: Path) -> None:
    """Removes a directory and its files, through no link."""
    with _beneath(directory) as (where, folder):
        for name in os.listdir(directory if folder is None else folder):
            _patiently(os.unlink, where / name, dir_fd=folder)
    _patiently(os.rmdir, directory)


def _patiently(call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Calls a function of the system again while, on Windows, another process has the file open for a moment."""
    for wait in (0.01, 0.03, 0.1, 0.3, 1) if sys.platform == "win32" else ():
        try:
            return call(*args, **kwargs)
        except PermissionError:  # Virus scanners and indexers open each new file.
            time.sleep(wait)
    return call(*args, **kwargs)


def lower_priority() -> None:
    """Lowers the priority of the calling thread, on Linux, where each thread has its own."""
    if sys.platform == "linux":
        os.nice(10)


def free_bytes(directory: Path) -> int:
    """The bytes that a user may still write to the disk of a directory."""
    return shutil.disk_usage(directory).free
