"""The state of anything as JSON and arrays, from which it comes back equal; no code is run from what is read.

What JSON lacks is an object with one key that tells what it is: `{"__tuple__": [1, 2]}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from handloom._interop.tensors import LIBRARIES, dense_on_host, kind_of, library_of, tensor_of
from handloom.checkpoint.dtypes import CODES
from handloom.errors import CheckpointError

Arrays = Mapping[str, np.ndarray]


def encode(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A value as JSON.

    Args:
        value: `None`, booleans, numbers, strings, bytes, arrays, tensors, and lists, tuples and dicts of these.
        name: What it is called.
        arrays: To which copies of its arrays are added, under names that begin with that name.

    Raises:
        CheckpointError: If there is anything else in it; names the place.
    """
    try:
        return _encoded(value, name, arrays)
    except RecursionError:
        raise CheckpointError(f"HL543: {_place(name)} is nested too deeply, or contains itself.") from None


def decode(value: Any, arrays: Arrays) -> Any:
    """What was encoded.

    Raises:
        CheckpointError: If this is nothing that was.
    """
    try:
        return _decoded(value, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"HL431: A state in the checkpoint cannot be decoded: {value!s:.80}.") from error


def _encoded(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return _encoded_items(value, name, arrays)
    if isinstance(value, tuple):
        return {"__tuple__": _encoded_items(value, name, arrays)}
    if isinstance(value, Mapping):
        return _encoded_dict(value, name, arrays)
    if _is_scalar(value):
        return _encoded_scalar(value)
    kind, array = _as_array(value, name)
    arrays[name] = array
    return {kind: name}


def _is_scalar(value: Any) -> bool:
    if isinstance(value, np.generic):
        return value.dtype.kind in "biufU" and value.dtype != np.longdouble
    return value is None or isinstance(value, (bool, int, float, str))


def _encoded_scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return {"__scalar__": [value.dtype.str, _encoded_scalar(value.item())]}
    return {"__number__": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _encoded_items(items: Iterable[Any], name: str, arrays: dict[str, np.ndarray]) -> list[Any]:
    return [_encoded(item, f"{name}[{index}]", arrays) for index, item in enumerate(items)]


def _encoded_dict(value: Mapping[Any, Any], name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if any(type(key) is not str for key in value) or (len(value) == 1 and next(iter(value)).startswith("__")):
        pairs = enumerate(value.items())
        return {"__pairs__": [_encoded_items(pair, f"{name}[{index}]", arrays) for index, pair in pairs]}
    # Keys become parts of the names of arrays: other than identifiers, they are numbered.
    names = [f"{name}.{key}" if key.isidentifier() else f"{name}[{index}]" for index, key in enumerate(value)]
    return {key: _encoded(inner, its_name, arrays) for (key, inner), its_name in zip(value.items(), names, strict=True)}


def _as_array(value: Any, name: str) -> tuple[str, np.ndarray]:
    """What kind of array it is, and a copy of its elements."""
    if isinstance(value, bytes):
        return "__bytes__", np.frombuffer(value, np.uint8)
    if isinstance(value, (np.ndarray, np.generic)):
        return "__array__" if isinstance(value, np.ndarray) else "__element__", _known(np.array(value), name)
    library = library_of(value)
    if library is None or kind_of(value) != "dense":
        raise _unknown(f"a {type(value).__name__}", name)
    return f"__{library}__", _known(np.array(dense_on_host(value)), name)


def _known(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.name not in CODES:
        raise _unknown(f"an array of dtype {array.dtype}", name)
    return array


def _unknown(found: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"HL432: {_place(name)} is {found}, which cannot be saved.",
        "A checkpoint holds no pickle, as loading one would run code from the file.",
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


def _tensor_of(library: str) -> Callable[[Any, Arrays], Any]:
    return lambda name, arrays: tensor_of(library, arrays[name])


_DECODERS: dict[str, Callable[[Any, Arrays], Any]] = {
    "__array__": lambda name, arrays: arrays[name],
    "__bytes__": lambda name, arrays: arrays[name].tobytes(),
    "__element__": lambda name, arrays: arrays[name][()],
    "__number__": lambda number, _: float(number),
    "__pairs__": lambda pairs, arrays: {_decoded(key, arrays): _decoded(inner, arrays) for key, inner in pairs},
    "__scalar__": lambda scalar, arrays: np.dtype(scalar[0]).type(_decoded(scalar[1], arrays)),
    "__tuple__": lambda items, arrays: tuple(_decoded(item, arrays) for item in items),
} | {f"__{library}__": _tensor_of(library) for library in LIBRARIES}


def decode_position(value: Any) -> Any:
    """Where a source of data stood, as checkpoints of format 1 have it.

    There everything but JSON's own values has a key that tells what it is: `{"dict": {"at": {"tuple": [1, 2]}}}`.
    """
    if isinstance(value, list):
        return [decode_position(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    [(kind, inner)] = value.items()
    return tensor_of(kind, inner) if kind in LIBRARIES else _FORMAT_1[kind](inner)


_FORMAT_1: dict[str, Callable[[Any], Any]] = {
    "array": np.array,
    "bytes": np.ndarray.tobytes,
    "dict": lambda inner: {key: decode_position(part) for key, part in inner.items()},
    "pairs": lambda inner: {decode_position(key): decode_position(part) for key, part in inner},
    "scalar": lambda array: array[()],
    "tuple": lambda inner: tuple(map(decode_position, inner)),
}
