"""The element types of safetensors, under their NumPy names."""

import ml_dtypes  # noqa: F401 - makes bfloat16 and float8 known to NumPy.
import numpy as np

from handloom.errors import CheckpointError

CODES = {
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def dtype_of(name: str) -> np.dtype:
    """The dtype of one of these names, little-endian as in a file."""
    return np.dtype(name).newbyteorder("<")


def as_stored(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array as a file holds it, little-endian and contiguous; the same array if it is so already."""
    if array.dtype.name not in CODES:
        raise CheckpointError(
            f"HL506: The array {name!r} has the dtype {array.dtype}, which safetensors does not support.",
            fix=f"Convert it to one of {', '.join(CODES)}.",
        )
    return np.asarray(array, dtype=dtype_of(array.dtype.name), order="C")


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of an array from `as_stored`."""
    return array.reshape(-1).view(np.uint8).data


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    if array.dtype.name.startswith(("bool", "int", "uint")):
        return True
    flat, count = array.reshape(-1), 1 << 20  # In parts, as the results take memory too.
    return all(bool(np.isfinite(flat[begin : begin + count]).all()) for begin in range(0, flat.size, count))
