"""Tensors of any library, on each backend."""

import sys

import ml_dtypes
import numpy as np
import pytest

from handloom._interop.tensors import LIBRARIES, dense_on_host, kind_of, library_of, sparse_on_host, tensor_of
from tests.numbers import same

jax, tf, torch = (pytest.importorskip(name) for name in LIBRARIES)
sparse = pytest.importorskip("jax.experimental.sparse")
DENSE = np.array([[0, 0, 5], [7, -2, 0]], "float32")
INDICES, VALUES = np.argwhere(DENSE), DENSE[DENSE != 0]

SPARSE = {
    "jax": lambda: sparse.BCOO.fromdense(DENSE),
    "tensorflow": lambda: tf.sparse.from_dense(DENSE),
    "torch": lambda: torch.from_numpy(DENSE).to_sparse(),
}
DENSELY = {"jax": jax.numpy.asarray, "tensorflow": tf.constant, "torch": torch.from_numpy}


@pytest.mark.parametrize("library", LIBRARIES)
def test_dense_on_host_reads_a_tensor_of_any_library(library):
    tensor = DENSELY[library](DENSE)
    assert (library_of(tensor), kind_of(tensor)) == (library, "dense")
    same(dense_on_host(tensor), DENSE)


@pytest.mark.parametrize("library", LIBRARIES)
def test_dense_on_host_and_tensor_of_keep_bfloat16(library):
    tensor = tensor_of(library, DENSE.astype(ml_dtypes.bfloat16))
    assert library_of(tensor) == library
    found = dense_on_host(tensor)
    assert found.dtype == ml_dtypes.bfloat16
    same(found.astype("float32"), DENSE)


@pytest.mark.parametrize("library", LIBRARIES)
def test_sparse_on_host_reads_a_tensor_of_any_library(library):
    tensor = SPARSE[library]()
    assert (library_of(tensor), kind_of(tensor)) == (library, "sparse")
    indices, values, shape = sparse_on_host(tensor)
    same(indices, INDICES)
    same(values, VALUES)
    assert shape == (2, 3)


def test_kind_of_knows_ragged_tensors():
    assert kind_of(tf.ragged.constant([[1], [2, 3]])) == "ragged"
    assert kind_of(torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)) == "ragged"


def test_dense_on_host_reads_parameters_and_tensors_that_require_gradients():
    for tensor in (torch.ones(2, requires_grad=True) * 2, torch.nn.Parameter(torch.full((2,), 2.0))):
        assert library_of(tensor) == "torch"
        same(dense_on_host(tensor), [2, 2])


@pytest.mark.parametrize("thing", [1, "a", None, np.ones(2), [1], int, torch.nn.Linear(1, 1)])
def test_library_of_is_none_for_everything_else(thing):
    assert library_of(thing) is None


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_of_takes_a_library_with_a_forbidden_import_as_absent(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert library_of(DENSE) is None
