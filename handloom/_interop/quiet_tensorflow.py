"""Imports TensorFlow without the lines that it prints about the processor and missing GPUs."""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def quiet_tensorflow(backend: str) -> None:
    """Asks TensorFlow to log errors only; imports it if it is the backend, because some lines heed no setting.

    Does nothing if the user has chosen a level.
    """
    if _LEVEL in os.environ:
        return
    os.environ[_LEVEL] = "3"
    if backend == "tensorflow" and importlib.util.find_spec(backend):
        with _native_stderr_hidden():
            importlib.import_module(backend)


@contextlib.contextmanager
def _native_stderr_hidden() -> Iterator[None]:
    """Hides what native code writes to the standard error stream, unless the block fails."""
    shown = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(shown, hidden.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)
