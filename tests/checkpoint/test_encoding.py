"""`encode` and `decode`: values of any supported type come back equal; everything else is refused."""

import pickle
from collections import OrderedDict, namedtuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from handloom.checkpoint.encoding import decode, encode
from handloom.errors import CheckpointError
from tests.checkpoint.common import through_a_checkpoint
from tests.numbers import same

pytestmark = pytest.mark.once

DTYPES = ["bool", "int8", "uint16", "int64", "uint64", "float16", "float32", "float64", "complex64"]
some_arrays = st.one_of(
    *(arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)) for dtype in DTYPES)
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(), st.text(), st.binary()
)
of_numpy = some_arrays.map(lambda array: array.ravel()[0] if array.size else np.float32(1))
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.binary(), st.tuples(st.integers(), st.text()))
alike = ["a", "a.b", "a[0]", "b", "__array__", "__tuple__", "__pairs__", "../b"]
values = st.recursive(
    st.one_of(scalars, some_arrays, of_numpy),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.sampled_from(alike), inner),
    ),
    max_leaves=12,
)


def shown(value):
    """A value as text, with types, signs of zero, and all digits."""
    with np.printoptions(floatmode="unique"):
        return repr(value)


@settings(max_examples=300, deadline=None)
@given(values)
@example({"a": {"b": np.array(1)}, "a.b": np.array(2), "a[0]": [np.array(3)]})
@example([{f"__{kind}__": "x"} for kind in ("tuple", "bytes", "array", "pairs", "torch")])
@example([np.float64("nan"), np.str_("text")])
def test_decode_returns_the_encoded_value(value):
    assert shown(through_a_checkpoint(value)) == shown(value)


def test_encode_keeps_scalars_of_ml_dtypes():
    found = through_a_checkpoint(ml_dtypes.bfloat16(1.5))
    assert (type(found), found) == (ml_dtypes.bfloat16, 1.5)


def test_encode_takes_subclasses_as_their_bases():
    value = (OrderedDict(b=1, a=2), namedtuple("Point", "x y")(1, 2.5))
    assert through_a_checkpoint(value) == value


def test_encode_copies_arrays():
    array, stored = np.arange(3), {}
    encode([array], "it", stored)
    array[:] = 7
    assert stored["it[0]"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint8", "bool"])
def test_encode_takes_tensors_of_torch(dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([[0, 1], [1, 3]], requires_grad=dtype == "float32", dtype=getattr(torch, dtype))
    [back] = through_a_checkpoint([tensor])
    assert (type(back), back.dtype) == (torch.Tensor, tensor.dtype)
    assert torch.equal(back, tensor)


def test_encode_takes_tensors_of_the_other_libraries():
    tf, jax = pytest.importorskip("tensorflow"), pytest.importorskip("jax")
    constant, array = through_a_checkpoint((tf.constant([1.5, 2]), jax.numpy.arange(3)))
    assert tf.is_tensor(constant)
    assert isinstance(array, jax.Array)
    same(np.asarray(constant), [1.5, 2])
    same(np.asarray(array), [0, 1, 2])


class Own:
    pass


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({1, 2}, "loader is a set"),
        ([1, (Own,)], r"loader\[1\]\[0\] is a type"),
        ({"a": {"b": lambda: 0}}, r"loader\.a\.b is a function"),
        (np.array(["a"]), "loader is an array of dtype <U1"),
        (np.array([Own()]), "loader is an array of dtype object"),
        (np.datetime64("2020"), r"loader is an array of dtype datetime64\[Y\]"),
        (range(3), "loader is a range"),
        (1j, "loader is a complex"),
        (bytearray(b"a"), "loader is a bytearray"),
    ],
)
def test_encode_refuses_everything_else_by_its_place(value, found):
    with pytest.raises(CheckpointError, match=rf"^{found}, which cannot be saved.*pickle.*Make the state of None"):
        encode(value, "@loader", {})


def test_encode_refuses_a_list_that_contains_itself():
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="is nested too deeply, or contains itself"):
        encode(loop, "it", {})


@pytest.mark.parametrize(
    "value",
    [
        *({"__pickle__": pickle.dumps(Own()).hex()}, {"__array__": "not there"}, {"__array__": ["it"]}),
        *({"__tuple__": 1}, {"__tuple__": [{"__exec__": "1"}]}, {"__pairs__": [[1]]}, {"__pairs__": [[[], 1]]}),
        *({"__scalar__": ["no type", 1]}, {"__number__": []}),
    ],
    ids=str,
)
def test_decode_refuses_values_that_encode_never_writes(value):
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        decode(value, {"it": np.zeros(1)})
