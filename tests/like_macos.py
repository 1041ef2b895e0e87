"""Makes this process like one on macOS, for what Handloom asks of the system. Import it before Handloom."""

import fcntl
import os
import sys

import jax  # noqa: F401  The libraries below Handloom are themselves.
import keras  # noqa: F401
import numpy as np  # noqa: F401

for name in ("O_DIRECT", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "memfd_create"):
    delattr(os, name)
fcntl.F_FULLFSYNC = 51
flushed = 0
_fcntl = fcntl.fcntl


def _control(file, command, argument=0):
    """Counts the files that are flushed through the cache of the disk, which `fsync` does not do there."""
    global flushed
    if command != fcntl.F_FULLFSYNC:
        return _fcntl(file, command, argument)
    flushed += 1
    return os.fsync(file)


fcntl.fcntl = _control
sys.platform = "darwin"
