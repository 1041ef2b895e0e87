"""Which line of the user's made a trace fail."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from handloom.errors import GradientError, TraceError

_NOT_THE_USERS = (
    str(Path(__file__).resolve().parents[1]) + os.sep,
    sysconfig.get_paths()["purelib"] + os.sep,
    sysconfig.get_paths()["stdlib"] + os.sep,
    "<frozen",
)
_TENSORFLOW = f"{os.sep}site-packages{os.sep}tensorflow{os.sep}"


Frames = Iterable[tuple[str, int]]
"""File and line of each call on the way to an error, the outermost first."""


def frames_of(error: BaseException) -> Frames:
    """The frames of an error's traceback."""
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def users_line(frames: Frames) -> str:
    """The innermost line that is neither ours nor a library's: `file, line 3: code`."""
    found = [(file, line) for file, line in frames if not file.startswith(_NOT_THE_USERS) or "/recipes/" in file]
    if not found:
        return "(line unknown)"
    file, line = found[-1]
    return f"{file}, line {line}: {linecache.getline(file, line).strip()}"


def needs_a_value(frames: Frames) -> TraceError:
    """The error for Python control flow over a tensor, or a tensor turned into a number, inside a trace."""
    return TraceError(
        "A compiled step needs the value of a tensor while it is being compiled, when it has none yet:\n"
        f"    {users_line(frames)}\n"
        "Use operations instead of Python here: keras.ops.cond or keras.ops.where for a branch, "
        "keras.ops.while_loop or keras.ops.fori_loop for a loop, keras.ops.cast for a conversion. "
        "To debug, run the step op by op: hl.run_eagerly(True)."
    )


def tensorflow_called(frames: Frames, backend: str) -> TraceError | None:
    """The error for an operation of TensorFlow inside a trace of another backend, if that is what failed.

    It takes tensors of others for data, and turns them into arrays.
    """
    if not any(_TENSORFLOW in file for file, _ in frames):
        return None
    return TraceError(
        f"A compiled step on {backend} calls TensorFlow, whose operations, TensorArray, sets and "
        f"queues take tensors of TensorFlow alone:\n    {users_line(frames)}\n"
        "Use keras.ops in the step (a TensorArray is what keras.ops.scan gathers), do it in the data's own pipeline "
        "(tf.data), or choose the backend: KERAS_BACKEND=tensorflow. To run the step op by op: hl.run_eagerly(True)."
    )


_HAS_NO_DERIVATIVE = re.compile(
    r"gradient registry has no entry for: (\w+)"
    r"|derivative for (\S+) is not implemented"
    r"|Differentiation rule for '(\S+)' not implemented"
)


@contextlib.contextmanager
def naming_what_has_no_derivative(backend: str) -> Iterator[None]:
    """Says of an operation that a framework cannot differentiate what to do about it."""
    try:
        yield
    except (LookupError, RuntimeError) as error:  # NotImplementedError is one of the latter.
        found = _HAS_NO_DERIVATIVE.search(str(error))
        if found is None:
            raise
        [operation] = filter(None, found.groups())
        raise GradientError(
            f"{backend} has no derivative of the operation {operation}. If no gradient is to flow "
            "through it, put its inputs in keras.ops.stop_gradient; else give it one by keras.ops.custom_gradient, or "
            "compute the value by other operations."
        ) from error
