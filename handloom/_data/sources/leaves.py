"""The single arrays of data: brought to the host, checked, and made tensors.

One rule for dtypes, on every backend: floating-point numbers of 64 bits become `keras.config.floatx()`, everything else
stays what it is; where the backend has fewer bits for whole numbers, one that does not fit is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  Makes bfloat16 and its like known to NumPy.
import numpy as np
import optree

from handloom._interop.tensors import dense_on_host, kind_of, library_of, sparse_on_host
from handloom._keras import Tensor, keras
from handloom.backends import backend
from handloom.errors import DataError

Path = Sequence[Any]
"""Where a leaf stands in data: keys and positions."""

_NUMBERS, _TEXT = "biufcV", "SU"  # As kinds of NumPy's; V is what ml_dtypes adds.


def is_arrays(data: Any) -> bool:
    """Whether data is arrays to be cut into batches, rather than a source of batches."""
    leaves = optree.tree_leaves(data)
    return bool(leaves) and all(_is_array(leaf) for leaf in leaves)


def _is_array(leaf: Any) -> bool:
    if library_of(leaf) is not None:
        return True
    return hasattr(leaf, "shape") and (hasattr(leaf, "__array__") or hasattr(leaf, "to_numpy"))


def on_host(leaf: Any) -> np.ndarray:
    """An array of NumPy's, of pandas, or a dense tensor of any library, in host memory; not to be written to."""
    if hasattr(leaf, "to_numpy"):
        return np.asarray(leaf.to_numpy())
    return dense_on_host(leaf) if library_of(leaf) else np.asarray(leaf)


def host_array(leaf: Any, path: Path) -> np.ndarray:
    """An array of examples in host memory, where slicing costs least. One that is mapped from a file stays there.

    Raises:
        DataError: If it is no array of numbers with an axis of examples.
    """
    if kind_of(leaf) != "dense":
        raise DataError(
            f"HL419: {place(path)} is a {kind_of(leaf)} tensor, which is not cut into batches. Have "
            "tf.data.Dataset.from_tensor_slices(...).batch(...) do that.",
        )
    array = on_host(leaf)
    if array.ndim == 0:
        raise DataError(f"HL420: {place(path)} is a single number; data has an axis of examples first.")
    _check_kind(array, path)
    if not is_mapped(leaf):
        check_range(array, path)
    return array


def is_mapped(array: Any) -> bool:
    """Whether an array is mapped from a file, so that a look at all of it would read the file."""
    return isinstance(array, np.memmap) or (isinstance(array, np.ndarray) and is_mapped(array.base))


def as_tensor(leaf: Any, path: Path) -> Tensor:
    """One leaf of a batch that a source gave, as a tensor of the backend.

    Raises:
        DataError: If the backend cannot hold it.
    """
    if keras.ops.is_tensor(leaf):
        return backend.to_tensor(leaf)
    kind = kind_of(leaf)
    if kind == "sparse" and (tensor := backend.sparse_tensor(*sparse_on_host(leaf))) is not None:
        return tensor
    if kind != "dense":
        raise _not_held(path, f"a {kind} tensor", _INSTEAD[kind])
    # A source may write its next batch over the last one, which the device perhaps has still to read: hence a copy.
    array = np.array(on_host(leaf))
    _check_kind(array, path)
    check_range(array, path)
    return backend.to_tensor(array)


_INSTEAD = {
    "sparse": "Make it dense where batches are made: dataset.map(tf.sparse.to_dense).",
    "ragged": "Make it dense where batches are made: to_tensor(), or padded_batch(...) instead of ragged batches.",
    "text": "Turn it into numbers first: labels by np.unique(labels, return_inverse=True)[1]; text by "
    "keras.layers.StringLookup or TextVectorization in a pipeline of tf.data. Or leave it out.",
}


def _check_kind(array: np.ndarray, path: Path) -> None:
    """Refuses what is not made of numbers; text where the backend has none."""
    kind = array.dtype.kind
    if kind in _TEXT or (kind == "O" and array.size and isinstance(array.flat[0], (str, bytes))):
        if not backend.holds_text:
            raise _not_held(path, f"text, for example {short(array.flat[0])}", _INSTEAD["text"])
        if kind in _TEXT:
            return
    if kind == "O":
        raise DataError(
            f"HL421: {place(path)} holds Python objects (dtype object), for example {short(array.flat[0])}. Convert it "
            "to numbers first, for example with .astype('float32'); pad rows of different lengths.",
        )
    if kind not in _NUMBERS or array.dtype.names or array.dtype == np.longdouble:
        raise DataError(
            f"HL422: {place(path)} has the dtype {array.dtype}, which no backend has. Convert it first, for example "
            "with .astype('float32').",
        )


def check_range(array: np.ndarray, path: Path) -> None:
    """Refuses whole numbers that the backend has not the bits for.

    Raises:
        DataError: If there is one.
    """
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8 or not array.size:
        return
    kept = np.dtype(backend.signature(backend.to_tensor(array[:0] if array.ndim else array))[1])
    least, largest = np.iinfo(kept).min, np.iinfo(kept).max
    if kept.itemsize < array.dtype.itemsize and (array.min() < least or array.max() > largest):
        raise DataError(
            f"HL423: {place(path)} has whole numbers from {array.min()} to {array.max()}, which do not fit into "
            f"{kept.name}, the most that this backend has. Number them from 0, or hash them to fewer values.",
        )


def _not_held(path: Path, what: str, instead: str) -> DataError:
    return DataError(f"HL424: {place(path)} is {what}, which this backend cannot hold in a step. {instead}")


def described(paths: Sequence[Path], leaves: Sequence[Any]) -> dict[str, str]:
    """Dtype and number of axes of each leaf of a batch, by where it stands."""
    return {place(path): _described(leaf) for path, leaf in zip(paths, leaves, strict=True)}


def _described(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", type(leaf))
    return f"{getattr(dtype, 'name', dtype)} with {len(getattr(leaf, 'shape', ()))} axes"


def place(path: Path) -> str:
    """Where an array stands in the data. Of a tuple, Keras's names: x, y, sample_weight."""
    if not path:
        return "the data"
    first = ("x", "y", "sample_weight")[path[0]] if path[0] in (0, 1, 2) else repr(path[0])
    return first + "".join(f"[{part!r}]" for part in path[1:])


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
