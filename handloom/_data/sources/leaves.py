"""The single arrays of data: copied to the host, checked, and converted to tensors.

One rule for dtypes, on every backend: 64-bit floating-point numbers become `keras.config.floatx()`, all other dtypes
are kept. If the backend has fewer bits for integers, an integer that does not fit is an error.
"""

from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  Registers bfloat16 and similar dtypes with NumPy.
import numpy as np
import optree

from handloom._interop.tensors import dense_on_host, is_scipy_matrix, kind_of, library_of, sparse_on_host
from handloom._keras import Tensor, keras
from handloom._trace.left_out import LeftOut, is_text, is_words, text_left_out
from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import DataError

Path = Sequence[Any]
"""The path of a leaf in the data: keys and positions."""

_NUMBERS = "biufcV"  # Kinds of NumPy dtypes; those of ml_dtypes are V.


def is_arrays(data: Any) -> bool:
    """Whether data is arrays to cut into batches, not a source of batches."""
    leaves = optree.tree_leaves(data, is_leaf=is_words)
    return bool(leaves) and all(is_words(leaf) or _is_array(leaf) for leaf in leaves)


def _is_array(leaf: Any) -> bool:
    if library_of(leaf) is not None or is_scipy_matrix(leaf):
        return True
    return hasattr(leaf, "shape") and (hasattr(leaf, "__array__") or hasattr(leaf, "to_numpy"))


def on_host(leaf: Any) -> np.ndarray:
    """A NumPy or pandas array, or a dense tensor of any library, in host memory. Do not write to it."""
    if hasattr(leaf, "to_numpy"):
        return np.asarray(leaf.to_numpy())
    return dense_on_host(leaf) if library_of(leaf) else np.asarray(leaf)


def host_array(leaf: Any, path: Path) -> Any:
    """An array of examples in host memory, where slicing is cheapest. An array mapped from a file stays mapped.

    A matrix of SciPy becomes one of rows; a ragged tensor stays itself on a backend that has such.

    Raises:
        DataError: It has no axis of examples, or an integer that does not fit.
    """
    if is_scipy_matrix(leaf):
        return leaf.tocsr()
    if kind_of(leaf) == "ragged" and keras.ops.is_tensor(leaf):
        return leaf
    if kind_of(leaf) != "dense":
        raise DataError(
            f"HL419: {place(path)} is a {kind_of(leaf)} tensor, which cannot be cut into batches.",
            fix="Pass tf.data.Dataset.from_tensor_slices(...).batch(...) instead.",
        )
    array = on_host(leaf)
    if array.ndim == 0:
        raise DataError(f"HL420: {place(path)} is a single number; data must have an axis of examples first.")
    if not is_mapped(leaf):
        check_range(array, path)
    return array


def is_mapped(array: Any) -> bool:
    """Whether an array is mapped from a file, so that a check of all values would read the file."""
    return isinstance(array, np.memmap) or (isinstance(array, np.ndarray) and is_mapped(array.base))


def as_tensor(leaf: Any, path: Path) -> Tensor | LeftOut:
    """Converts one leaf of a batch of a source to a tensor of the backend.

    Raises:
        DataError: An integer does not fit.
    """
    if keras.ops.is_tensor(leaf):
        return backend.to_tensor(leaf)
    kind = kind_of(leaf)
    if kind == "sparse" and (tensor := _sparse(leaf)) is not None:
        return tensor
    if kind != "dense":
        return LeftOut(
            DataError(
                f"HL414: {place(path)} is a {kind} tensor, which this backend cannot hold in a step.",
                fix="Make it dense where the batches are made: a sparse tensor with dataset.map(tf.sparse.to_dense), a "
                "ragged tensor with to_tensor(), or padded_batch(...).",
            )
        )
    # A copy: the source may overwrite the batch with the next one before the device has read it.
    array = np.array(on_host(leaf))
    if (left_out := unheld(array, path)) is not None:
        return left_out
    check_range(array, path)
    return backend.to_tensor(array)


def _sparse(leaf: Any) -> Tensor | None:
    """A sparse tensor; on a backend without, a matrix of SciPy becomes dense, as in Keras."""
    indices, values, shape = sparse_on_host(leaf)
    if values.dtype == np.float64:
        values = values.astype(keras.config.floatx())
    tensor = backend.sparse_tensor(indices, values, shape)
    return backend.to_tensor(leaf.toarray()) if tensor is None and is_scipy_matrix(leaf) else tensor


def unheld(array: np.ndarray, path: Path) -> LeftOut | None:
    """Takes the place of an array, unless it holds numbers, or text on a backend that has text."""
    kind = array.dtype.kind
    if is_text(array):
        return None if backend.holds_text else text_left_out(place(path), array)
    if kind == "O":
        other = next((value for value in array.flat if not isinstance(value, (str, bytes))), None)
        return LeftOut(
            DataError(
                f"HL421: {place(path)} holds Python objects (dtype object), for example {short(other)}.",
                fix="Convert it to numbers, for example with .astype('float32'); pad rows of different lengths; in "
                "text, fill in what is missing.",
            )
        )
    if kind not in _NUMBERS or array.dtype.names or array.dtype == np.longdouble:
        return LeftOut(
            DataError(
                f"HL422: {place(path)} has the dtype {array.dtype}, which no backend has.",
                fix="Convert it, for example with .astype('float32').",
            )
        )
    return None


def check_any_held(leaves: Sequence[Any]) -> None:
    """Raises an error if all leaves of a batch are left out.

    Raises:
        DataError: Says what the first is.
    """
    if leaves and all(isinstance(leaf, LeftOut) for leaf in leaves):
        leaves[0].refuse()


def check_range(array: np.ndarray, path: Path) -> None:
    """Raises an error if the backend has too few bits for one of the integers.

    Raises:
        DataError: An integer does not fit.
    """
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8 or not array.size:
        return
    kept = np.dtype(backend.signature(backend.to_tensor(array[:0] if array.ndim else array))[1])
    least, largest = np.iinfo(kept).min, np.iinfo(kept).max
    if kept.itemsize < array.dtype.itemsize and (array.min() < least or array.max() > largest):
        raise DataError(
            f"HL423: {place(path)} has whole numbers from {array.min()} to {array.max()}, which do not fit into "
            f"{kept.name}, the largest integer dtype of this backend.",
            fix="Number them from 0, or hash them to fewer values.",
        )


def described(paths: Sequence[Path], leaves: Sequence[Any]) -> dict[str, str]:
    """Dtype and number of axes of each leaf of a batch, by its place."""
    return {place(path): _described(leaf) for path, leaf in zip(paths, leaves, strict=True)}


def _described(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", type(leaf))
    return f"{getattr(dtype, 'name', dtype)} with {len(getattr(leaf, 'shape', ()))} axes"


def place(path: Path) -> str:
    """The place of an array in the data, in words. The parts of a tuple have Keras's names: x, y, sample_weight."""
    if not path:
        return "the data"
    first = ("x", "y", "sample_weight")[path[0]] if path[0] in (0, 1, 2) else repr(path[0])
    return first + "".join(f"[{part!r}]" for part in path[1:])
