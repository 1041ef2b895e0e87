"""Tensors of any library, on each backend."""

import sys

import ml_dtypes
import numpy as np
import pytest

from handloom._interop.tensors import LIBRARIES, dense_on_host, kind_of, library_of, sparse_on_host, tensor_of

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
def test_a_dense_tensor_is_known_and_read(library):
    tensor = DENSELY[library](DENSE)
    assert (library_of(tensor), kind_of(tensor)) == (library, "dense")
    np.testing.assert_array_equal(dense_on_host(tensor), DENSE)


@pytest.mark.parametrize("library", LIBRARIES)
def test_bfloat16_is_read_as_such(library):
    tensor = tensor_of(library, DENSE.astype(ml_dtypes.bfloat16))
    assert library_of(tensor) == library
    found = dense_on_host(tensor)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype("float32"), DENSE)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_sparse_tensor_is_known_and_read(library):
    tensor = SPARSE[library]()
    assert (library_of(tensor), kind_of(tensor)) == (library, "sparse")
    indices, values, shape = sparse_on_host(tensor)
    np.testing.assert_array_equal(indices, INDICES)
    np.testing.assert_array_equal(values, VALUES)
    assert shape == (2, 3)


def test_ragged_tensors_are_known():
    assert kind_of(tf.ragged.constant([[1], [2, 3]])) == "ragged"
    assert kind_of(torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)) == "ragged"


def test_what_asks_for_gradients_and_parameters_are_read():
    for tensor in (torch.ones(2, requires_grad=True) * 2, torch.nn.Parameter(torch.full((2,), 2.0))):
        assert library_of(tensor) == "torch"
        np.testing.assert_array_equal(dense_on_host(tensor), [2, 2])


@pytest.mark.parametrize("thing", [1, "a", None, np.ones(2), [1], int, torch.nn.Linear(1, 1)])
def test_everything_else_is_no_tensor(thing):
    assert library_of(thing) is None


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_whose_import_is_forbidden_is_one_that_is_not_there(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert library_of(DENSE) is None
