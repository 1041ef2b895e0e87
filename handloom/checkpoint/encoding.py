"""A lossless encoding of states as JSON values and arrays. Decoding runs no code from the file.

A value that JSON lacks is an object with one key that names its type: `{"__tuple__": [1, 2]}`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from handloom._interop.tensors import LIBRARIES, dense_on_host, kind_of, library_of, tensor_of
from handloom.checkpoint.dtypes import CODES
from handloom.errors import CheckpointError

Arrays = Mapping[str, np.ndarray]


def encode(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Encodes a value as JSON values.

    Args:
        value: `None`, booleans, numbers, strings, bytes, arrays, tensors, and lists, tuples and dicts of these.
        name: Its name.
        arrays: Receives copies of its arrays, under names that begin with that name.

    Raises:
        CheckpointError: The value contains anything else; the message names the place.
    """
    try:
        return _encoded(value, name, arrays)
    except RecursionError:
        raise CheckpointError(f"HL543: {_place(name)} is nested too deeply, or contains itself.") from None


def decode(value: Any, arrays: Arrays) -> Any:
    """Decodes a value.

    Raises:
        CheckpointError: `encode` did not write it.
    """
    try:
        return _decoded(value, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"HL557: A state in the checkpoint cannot be decoded: {value!s:.80}.") from error


def _encoded(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, (list, tuple)):
        items = _encoded_items(value, name, arrays)
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, Mapping):
        return _encoded_dict(value, name, arrays)
    if isinstance(value, np.generic) and value.dtype.kind in "biufU" and value.dtype != np.longdouble:
        return {"__scalar__": [value.dtype.str, _encoded(value.item(), name, arrays)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__number__": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind, arrays[name] = _as_array(value, name)
    return {f"__{kind}__": name}


def _encoded_items(items: Iterable[Any], name: str, arrays: dict[str, np.ndarray]) -> list[Any]:
    return [_encoded(item, f"{name}[{index}]", arrays) for index, item in enumerate(items)]


def _encoded_dict(value: Mapping[Any, Any], name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if any(type(key) is not str for key in value) or (len(value) == 1 and next(iter(value)).startswith("__")):
        pairs = enumerate(value.items())
        return {"__pairs__": [_encoded_items(pair, f"{name}[{index}]", arrays) for index, pair in pairs]}
    # Keys become parts of array names. A key that is not an identifier is replaced by its number.
    names = [f"{name}.{key}" if key.isidentifier() else f"{name}[{index}]" for index, key in enumerate(value)]
    return {key: _encoded(inner, its_name, arrays) for (key, inner), its_name in zip(value.items(), names, strict=True)}


def _as_array(value: Any, name: str) -> tuple[str, np.ndarray]:
    """The kind of an array, and a copy of its elements."""
    if isinstance(value, bytes):
        return "bytes", np.frombuffer(value, np.uint8)
    if isinstance(value, (np.ndarray, np.generic)):
        kind, array = "array" if isinstance(value, np.ndarray) else "element", np.array(value)
    elif (library := library_of(value)) is not None and kind_of(value) == "dense":
        kind, array = library, np.array(dense_on_host(value))
    else:
        raise _refusal(f"a {type(value).__name__}", name)
    if array.dtype.name not in CODES:
        raise _refusal(f"an array of dtype {array.dtype}", name)
    return kind, array


def _refusal(found: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"HL558: {_place(name)} is {found}, which cannot be saved.",
        "A checkpoint holds no pickle: loading one would run code from the file.",
        "Make the state of None, booleans, numbers, strings, bytes, arrays, tensors, and lists, tuples and dicts of "
        "these.",
    )


def _place(name: str) -> str:
    return name.removeprefix("@")[:200]


def _decoded(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, list):
        return [_decoded(inner, arrays) for inner in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        [(kind, inner)] = value.items()
        if kind.startswith("__"):
            return _DECODERS[kind](inner, arrays)
    return {key: _decoded(inner, arrays) for key, inner in value.items()}


def _tensor(library: str, name: str, arrays: Arrays) -> Any:
    return tensor_of(library, arrays[name])


_DECODERS: dict[str, Callable[[Any, Arrays], Any]] = {
    "__array__": lambda name, arrays: arrays[name],
    "__bytes__": lambda name, arrays: arrays[name].tobytes(),
    "__element__": lambda name, arrays: arrays[name][()],
    "__number__": lambda number, _: float(number),
    "__pairs__": lambda pairs, arrays: {_decoded(key, arrays): _decoded(inner, arrays) for key, inner in pairs},
    "__scalar__": lambda scalar, arrays: np.dtype(scalar[0]).type(_decoded(scalar[1], arrays)),
    "__tuple__": lambda items, arrays: tuple(_decoded(item, arrays) for item in items),
}
_DECODERS |= {f"__{library}__": functools.partial(_tensor, library) for library in LIBRARIES}


def decode_position(value: Any) -> Any:
    """Decodes the position of a source of data as checkpoints of format 1 hold it.

    Values that JSON lacks have a key that names their type, and so have dicts: `{"dict": {"at": {"tuple": [1, 2]}}}`.
    """
    if isinstance(value, list):
        return [decode_position(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    [(kind, inner)] = value.items()
    return _FORMAT_1[kind](inner)


_FORMAT_1: dict[str, Callable[[Any], Any]] = {
    "array": np.array,
    "bytes": np.ndarray.tobytes,
    "dict": lambda inner: {key: decode_position(part) for key, part in inner.items()},
    "pairs": lambda inner: {decode_position(key): decode_position(part) for key, part in inner},
    "scalar": lambda array: array[()],
    "tuple": lambda inner: tuple(map(decode_position, inner)),
}
_FORMAT_1 |= {library: functools.partial(tensor_of, library) for library in LIBRARIES}
