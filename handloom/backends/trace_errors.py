"""The errors of a trace, with the line of the user's that made it fail."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from handloom._util.source_line import Frames, place_in, shown
from handloom.errors import GradientError, TraceError

_TENSORFLOW = f"{os.sep}site-packages{os.sep}tensorflow{os.sep}"


def needs_a_value(frames: Frames) -> TraceError:
    """The error for Python control flow over a tensor, or a tensor turned into a number, inside a trace."""
    return TraceError(
        "HL104: A compiled step needs the value of a tensor while it is being compiled, when it has none yet:\n"
        f"    {shown(place_in(frames))}\n"
        "Use operations instead of Python here: keras.ops.cond or keras.ops.where for a branch, "
        "keras.ops.while_loop or keras.ops.fori_loop for a loop, keras.ops.cast for a conversion. "
        "To debug, run the step op by op: hl.run_eagerly(True).",
    )


def tensorflow_called(frames: Frames, backend: str) -> TraceError | None:
    """The error for an operation of TensorFlow inside a trace of another backend, if that is what failed.

    It takes tensors of others for data, and turns them into arrays.
    """
    if not any(_TENSORFLOW in file for file, _ in frames):
        return None
    return TraceError(
        f"HL105: A compiled step on {backend} calls TensorFlow, whose operations, TensorArray, sets and "
        f"queues take tensors of TensorFlow alone:\n    {shown(place_in(frames))}\n"
        "Use keras.ops in the step (a TensorArray is what keras.ops.scan gathers), do it in the data's own pipeline "
        "(tf.data), or choose the backend: KERAS_BACKEND=tensorflow. To run the step op by op: hl.run_eagerly(True).",
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
            f"HL106: {backend} has no derivative of the operation {operation}. If no gradient is to flow "
            "through it, put its inputs in keras.ops.stop_gradient; else give it one by keras.ops.custom_gradient, or "
            "compute the value by other operations.",
        ) from error
