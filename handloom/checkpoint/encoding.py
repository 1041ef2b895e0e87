"""Values of Python as JSON and arrays, from which they come back equal, with no code run from what is read.

What JSON lacks is written as a dict with one key that tells what it is: `{"tuple": [1, 2]}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from handloom._interop.tensors import LIBRARIES, dense_on_host, kind_of, library_of, tensor_of
from handloom.checkpoint.dtypes import CODES
from handloom.errors import DataError


def encode(value: Any, what: str) -> Any:
    """A value as JSON and NumPy arrays.

    Args:
        value: `None`, booleans, numbers, strings, bytes, arrays, tensors, and lists, tuples and dicts of these.
        what: What it is, for the error.

    Raises:
        DataError: If there is anything else in it.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(inner, what) for inner in value]
    if type(value) is tuple:
        return {"tuple": [encode(inner, what) for inner in value]}
    return _encoded_dict(value, what) if type(value) is dict else _encoded_array(value, what)


def decode(value: Any) -> Any:
    """What was encoded.

    Raises:
        DataError: If it is nothing that was.
    """
    if isinstance(value, list):
        return [decode(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        [(kind, inner)] = value.items()
        if kind in _DECODERS:
            return _DECODERS[kind](inner)
        if kind in LIBRARIES:
            return tensor_of(kind, inner)
    raise DataError("HL431", f"The state holds {str(value)[:60]}, which stands for no value.")


def _encoded_dict(value: dict[Any, Any], what: str) -> dict[str, Any]:
    # In a checkpoint keys become parts of names, and some with underscores first mean something.
    if all(type(key) is str and key.isidentifier() and not key.startswith("__") for key in value):
        return {"dict": {key: encode(inner, what) for key, inner in value.items()}}
    return {"pairs": [[encode(key, what), encode(inner, what)] for key, inner in value.items()]}


def _encoded_array(value: Any, what: str) -> dict[str, np.ndarray]:
    if type(value) is bytes:
        return {"bytes": np.frombuffer(value, np.uint8)}
    if isinstance(value, np.generic):
        return {"scalar": _checked(np.asarray(value), what)}
    if type(value) is np.ndarray:
        return {"array": _checked(value, what)}
    library = library_of(value)
    if library is None or kind_of(value) != "dense":
        raise _unknown(f"a {type(value).__name__}", what)
    return {library: _checked(dense_on_host(value), what)}


def _checked(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype.name not in CODES:
        raise _unknown(f"an array of dtype {array.dtype}", what)
    return array


def _unknown(found: str, what: str) -> DataError:
    return DataError(
        "HL432",
        f"{what} holds {found}, which cannot be saved without pickle. Have its state be made of None, booleans, "
        "numbers, strings, bytes, arrays, tensors, and lists, tuples and dicts of these.",
    )


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "array": np.array,
    "bytes": lambda array: array.tobytes(),
    "dict": lambda inner: {key: decode(part) for key, part in inner.items()},
    "pairs": lambda inner: {decode(key): decode(part) for key, part in inner},
    "scalar": lambda array: array[()],
    "tuple": lambda inner: tuple(map(decode, inner)),
}
