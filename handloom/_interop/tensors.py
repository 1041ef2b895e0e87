"""Tensors of JAX, TensorFlow and PyTorch on any backend: their library, their kind, and their values on the host."""

import importlib
import sys
from typing import Any

import ml_dtypes
import numpy as np

LIBRARIES = ("jax", "tensorflow", "torch")


def seed_libraries(seed: int) -> None:
    """Seeds PyTorch and TensorFlow, from which sources of data draw on any backend, if they are imported."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(seed)


def library_of(leaf: Any) -> str | None:
    """The library of a tensor; `None` for anything else. Imports nothing: no tensor exists before its library does."""
    loaded = {name: sys.modules[name] for name in LIBRARIES if sys.modules.get(name)}
    if "torch" in loaded and isinstance(leaf, loaded["torch"].Tensor):
        return "torch"
    if "tensorflow" in loaded and loaded["tensorflow"].is_tensor(leaf):
        return "tensorflow"
    if "jax" in loaded and (isinstance(leaf, loaded["jax"].Array) or _is_jax_sparse(leaf)):
        return "jax"
    return None


def kind_of(leaf: Any) -> str:
    """How a tensor of any library, or a matrix of SciPy, holds its values: `"dense"`, `"sparse"` or `"ragged"`."""
    if type(leaf).__name__ == "RaggedTensor" or getattr(leaf, "is_nested", False):
        return "ragged"
    is_sparse = type(leaf).__name__ == "SparseTensor" or _is_jax_sparse(leaf) or is_scipy_matrix(leaf)
    return "sparse" if is_sparse or str(getattr(leaf, "layout", "")).startswith("torch.sparse") else "dense"


def dense_on_host(tensor: Any) -> np.ndarray:
    """The values of a dense tensor of any library; the array may share its memory."""
    if library_of(tensor) != "torch":
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # PyTorch does not convert it to NumPy.
        return np.asarray(tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def sparse_on_host(tensor: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Indices `(stored, axes)`, values `(stored,)` and shape of a sparse tensor of any library, or matrix of SciPy."""
    shape = tuple(int(size) for size in tensor.shape)
    if is_scipy_matrix(tensor):
        tensor = tensor.tocsr().tocoo()  # Sums repeated values.
        return np.stack([tensor.row, tensor.col], axis=1).astype(np.int64), tensor.data, shape
    if (library := library_of(tensor)) == "torch":
        tensor = tensor.detach().to_sparse_coo().coalesce()
        return dense_on_host(tensor.indices().T), dense_on_host(tensor.values()), shape
    values = tensor.data if library == "jax" else tensor.values
    return np.asarray(tensor.indices), np.asarray(values), shape


def tensor_of(library: str, array: np.ndarray, *, copy: bool = True) -> Any:
    """Makes a dense tensor of a library, on the host. Without `copy`, a PyTorch tensor shares the memory of the array.

    Raises:
        ImportError: The library is not installed.
    """
    module = importlib.import_module(library)
    if library == "torch":
        array = array.copy() if copy else array
        if array.dtype == ml_dtypes.bfloat16:  # PyTorch does not convert it from NumPy.
            return module.from_numpy(array.view(np.int16)).view(module.bfloat16)
        return module.from_numpy(array)
    return module.constant(array) if library == "tensorflow" else module.numpy.asarray(array)


def stored_values(array: Any) -> np.ndarray:
    """The values that a matrix of SciPy or a ragged tensor stores."""
    return np.asarray(array.data if is_scipy_matrix(array) else array.flat_values)


def is_scipy_matrix(leaf: Any) -> bool:
    """Whether a leaf is a sparse matrix, or sparse array of two axes, of SciPy."""
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and sparse.issparse(leaf) and leaf.ndim == 2


def rows_of(array: Any, chosen: Any) -> Any:
    """Some rows of an array, a matrix of SciPy or a ragged tensor: a slice of them, or by their numbers."""
    if kind_of(array) == "ragged" and isinstance(chosen, np.ndarray):
        return sys.modules["tensorflow"].gather(array, chosen)
    # Not every format of SciPy has rows. pandas has columns first.
    return (array.tocsr() if is_scipy_matrix(array) else getattr(array, "iloc", array))[chosen]


def _is_jax_sparse(leaf: Any) -> bool:
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(leaf, sparse.JAXSparse)
