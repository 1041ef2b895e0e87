"""Makes this process like one on Windows, for what Handloom asks of the system. Import it before Handloom.

What Windows lacks is removed, its lock of bytes emulated, and what it refuses is refused: to open a directory, to
rename over another file, to rename or remove what is open, or what a virus scanner has opened for an instant.
"""

import fcntl
import os
import signal
import struct
import sys
import types

import jax  # noqa: F401  The libraries below Handloom are themselves.
import keras  # noqa: F401
import numpy as np  # noqa: F401

msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK = 2


def locking(file, mode, count, lock=fcntl.fcntl):
    begin = os.lseek(file, 0, os.SEEK_CUR)
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, begin, count, 0)
    try:
        lock(file, 37, wanted)  # F_OFD_SETLK: a lock of the open file, not of the process.
    except OSError as error:
        raise PermissionError(error.errno, "Permission denied") from None


msvcrt.locking = locking
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "readline", "syslog"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECT", "O_SYNC", "readv", "nice", "fork"):
    delattr(os, name)
for name in ("register_at_fork", "posix_fadvise", "getuid", "geteuid", "getpgid", "killpg", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "pthread_sigmask", "setitimer", "alarm"):
    delattr(signal, name)
os.supports_dir_fd = set()
os.supports_follow_symlinks = set()

_busy = {"rename": 1, "unlink": 1}  # How often a virus scanner still has the file open.


def _refuse_open(path):
    """Windows neither renames nor removes an open file, nor a directory with one in it."""
    path = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            opened = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if opened == path or opened.startswith(path + os.sep):
            raise PermissionError(13, "it is used by another process", str(path))


def _like_windows(name, over=False):
    original = getattr(os, name)

    def call(path, *others, dir_fd=None):
        assert dir_fd is None
        if over and os.path.exists(others[0]):
            raise FileExistsError(17, "it exists", str(others[0]))
        _refuse_open(path)
        if _busy.get(name):
            _busy[name] -= 1
            raise PermissionError(13, "it is used by another process", str(path))
        return original(path, *others)

    setattr(os, name, call)


_like_windows("rename", over=True)
_like_windows("replace")
_like_windows("unlink")
_like_windows("rmdir")
_open = os.open


def _open_file(path, flags, mode=0o777, *, dir_fd=None):
    assert dir_fd is None
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return _open(path, flags, mode)


os.open = _open_file
sys.platform = "win32"
