"""Errors of a trace, with the line of the user's code that failed."""

import contextlib
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

from handloom._keras import keras
from handloom._util.source_line import Frames, frames_of, place_in, shown
from handloom.errors import GradientError, TraceError

_TENSORFLOW = f"{os.sep}site-packages{os.sep}tensorflow{os.sep}"


def described_place(error: BaseException) -> str:
    """The layer, metric or loss in which an error was raised, and the user's line; empty if neither is known."""
    owners: list[Any] = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    kinds = (("layer", keras.Layer), ("metric", keras.Metric), ("loss", keras.Loss))
    named = [f", in the {kind} {owner.name!r}" for owner in owners for kind, cls in kinds if _is_part(owner, cls)]
    place = place_in(frames_of(error))
    return (named or [""])[-1] + ("" if place is None else f" ({shown(place)})")


def _is_part(owner: object, cls: type) -> bool:
    return isinstance(owner, cls) and not isinstance(owner, keras.Model)


def needs_a_value(frames: Frames) -> TraceError:
    """The error for Python control flow over a tensor, or a tensor turned into a number, inside a trace."""
    place = place_in(frames)
    return TraceError(
        f"HL104: A compiled step uses the value of a tensor in Python ({shown(place)}).",
        "Tensors have no values while a step is compiled.",
        "Use operations instead: keras.ops.cond or keras.ops.where for a branch, keras.ops.while_loop or "
        "keras.ops.fori_loop for a loop, keras.ops.cast for a conversion, keras.ops.shape for a size. To look at a "
        "value, return it from the step, or run the step eagerly: hl.run_eagerly(True).",
        at=place,
    )


def leaked(frames: Frames) -> TraceError:
    """The error for a tensor of a trace that is used outside of it."""
    place = place_in(frames)
    return TraceError(
        f"HL102: A tensor is used outside of the function that computed it ({shown(place)}).",
        "It was kept, in an attribute for example, while a function ran whose tensors have no values outside: an "
        "earlier trace of the step, a loss function, or a function that was passed to an operation (keras.ops.cond, "
        "while_loop, scan, map, vectorized_map).",
        "Return the tensor from the function (with has_aux=True from a loss function), compute it in `build` or "
        "`__init__`, or keep its value in a keras.Variable.",
        at=place,
    )


def read_while_differentiated(frames: Frames, backend: str) -> TraceError:
    """The error for the same in a differentiated function, on a backend that has no values there."""
    place = place_in(frames)
    return TraceError(
        f"HL128: A differentiated function uses the value of a tensor in Python ({shown(place)}).",
        f"On {backend}, tensors have no values in it, not even in eager execution.",
        'To look at a value, return it (has_aux=True), or print it with jax.debug.print("{}", x). To compute with it, '
        "use operations: keras.ops.cond or keras.ops.where for a branch, keras.ops.while_loop or keras.ops.fori_loop "
        "for a loop, keras.ops.cast for a conversion, keras.ops.shape for a size. What only gathers data, such as an "
        "episode, belongs before the call of minimize() or value_and_grad().",
        at=place,
    )


def read_by_numpy(frames: Frames) -> TraceError:
    """The error for a tensor of PyTorch that NumPy cannot read."""
    place = place_in(frames)
    return TraceError(
        f"HL126: NumPy needs the value of a tensor that is part of a gradient ({shown(place)}).",
        "NumPy computes no gradients, and a compiled step has no values.",
        "Compute with keras.ops in place of NumPy. To look at a value, return it, or run the step eagerly, with "
        "hl.run_eagerly(True), and call keras.ops.convert_to_numpy(x).",
        at=place,
    )


def tensorflow_called(frames: Frames, backend: str) -> TraceError | None:
    """The error for an operation of TensorFlow inside a trace of another backend; `None` if something else failed.

    Such an operation takes the tensors of other backends for data and converts them to arrays.
    """
    if not any(_TENSORFLOW in file for file, _ in frames):
        return None
    place = place_in(frames)
    return TraceError(
        f"HL105: A compiled step on {backend} calls TensorFlow ({shown(place)}).",
        "Operations, TensorArrays, sets and queues of TensorFlow take tensors of TensorFlow only.",
        "Use keras.ops in the step (keras.ops.scan in place of a TensorArray), move the call into the data pipeline "
        "(tf.data), or choose the backend: KERAS_BACKEND=tensorflow. To run the step eagerly: hl.run_eagerly(True).",
        at=place,
    )


_HAS_NO_DERIVATIVE = re.compile(
    r"gradient registry has no entry for: (\w+)"
    r"|derivative for (\S+) is not implemented"
    r"|Differentiation rule for '(\S+)' not implemented"
)


@contextlib.contextmanager
def naming_what_has_no_derivative(backend: str) -> Iterator[None]:
    """Raises a clear error if the framework cannot differentiate an operation."""
    try:
        yield
    except (LookupError, RuntimeError) as error:  # NotImplementedError is one of the latter.
        found = _HAS_NO_DERIVATIVE.search(str(error))
        if found is None:
            raise
        [operation] = filter(None, found.groups())
        raise GradientError(
            f"HL106: {backend} has no derivative of the operation {operation}.",
            fix="If no gradient should flow through it, wrap its inputs in keras.ops.stop_gradient; otherwise define "
            "its gradient with keras.ops.custom_gradient, or use other operations.",
        ) from error
