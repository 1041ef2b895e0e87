"""The types of array elements that safetensors knows, by their names in NumPy."""

from __future__ import annotations

import importlib

import numpy as np

from handloom.errors import CheckpointError

CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def dtype_of(name: str) -> np.dtype:
    """The type of that name, little-endian as in the file."""
    if name not in CODES:
        raise CheckpointError(f"HL505: The type {name[:40]!r} is none that a checkpoint holds: {', '.join(CODES)}.")
    if "bfloat" in name or "float8" in name:
        importlib.import_module("ml_dtypes")  # Makes the names known to NumPy.
        return np.dtype(name)
    return np.dtype(name).newbyteorder("<")


def plain(name: str, array: np.ndarray) -> np.ndarray:
    """The array as it is to stand in the file: little-endian, one element after the other; the same one if it is so."""
    if array.dtype.name not in CODES:
        raise CheckpointError(
            f"HL506: The array {name!r} is of type {array.dtype}, which safetensors has not. "
            f"Turn it into one of {', '.join(CODES)}.",
        )
    return np.asarray(array, dtype=dtype_of(array.dtype.name), order="C")


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of an array from `plain`."""
    return array.reshape(-1).view(np.uint8).data


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    if array.dtype.name.startswith(("bool", "int", "uint")):
        return True
    flat, count = array.reshape(-1), 1 << 20  # In pieces, as the answers take memory too.
    return all(bool(np.isfinite(flat[begin : begin + count]).all()) for begin in range(0, flat.size, count))
