"""Plain values come back equal, whatever they are made of; everything else is refused, and nothing runs code."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from handloom.checkpoint import snapshot
from handloom.checkpoint.encoding import decode, encode
from handloom.errors import DataError

pytestmark = pytest.mark.once

DTYPES = ["bool", "int8", "uint16", "int64", "uint64", "float16", "float32", "float64"]
some_arrays = st.one_of(
    *(arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)) for dtype in DTYPES)
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(), st.text(), st.binary()
)
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.binary(), st.tuples(st.integers(), st.text()))
values = st.recursive(
    st.one_of(scalars, some_arrays, some_arrays.map(lambda array: array.ravel()[0] if array.size else np.float32(1))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "a.dict.b", "b", "__array__", "dict", "tuple", "array"]), inner),
    ),
    max_leaves=12,
)


class Holder:
    """Something with a state, as checkpoints take it."""

    def __init__(self, state=None):
        self.kept = state

    def state(self):
        return self.kept

    def restore(self, state):
        self.kept = state


def through_a_checkpoint(encoded):
    packed, contents = snapshot.take({"it": Holder({"value": encoded})})
    back = Holder()
    snapshot.put({"it": back}, packed, json.loads(json.dumps(contents)))
    return back.kept["value"]


def same(one, two):
    """Equal, and of equal types all the way down."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray | np.generic):
        return (
            one.dtype == two.dtype
            and one.shape == two.shape
            and np.array_equal(one, two, equal_nan=one.dtype.kind == "f")
        )
    if isinstance(one, dict):
        return [*one] == [*two] and all(map(same, one, two)) and all(map(same, one.values(), two.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, float):
        return (one == two and math.copysign(1, one) == math.copysign(1, two)) or (math.isnan(one) and math.isnan(two))
    return one == two


@settings(max_examples=300, deadline=None)
@given(values)
def test_a_value_comes_back_equal(value):
    assert same(decode(through_a_checkpoint(encode(value, "it"))), value)


def test_names_that_look_alike_are_kept_apart():
    value = {"a": {"b": np.array(1)}, "a.dict.b": np.array(2), "a.b": np.array(3)}
    assert same(decode(through_a_checkpoint(encode(value, "it"))), value)


def test_a_value_that_looks_like_what_is_written_comes_back_as_itself():
    for value in ({"tuple": [1]}, {"bytes": "x"}, {"__array__": "y"}, {"pairs": []}, {"torch": 1}):
        assert same(decode(through_a_checkpoint(encode(value, "it"))), value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint8", "bool"])
def test_tensors_of_torch_come_back_as_such(dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([[0, 1], [1, 3]], requires_grad=dtype == "float32", dtype=getattr(torch, dtype))
    back = decode(through_a_checkpoint(encode([tensor], "it")))[0]
    assert type(back) is torch.Tensor
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_tensors_of_the_others_do_too():
    tf, jax = pytest.importorskip("tensorflow"), pytest.importorskip("jax")
    constant, array = decode(encode((tf.constant([1.5, 2]), jax.numpy.arange(3)), "it"))
    assert tf.is_tensor(constant)
    assert isinstance(array, jax.Array)
    np.testing.assert_array_equal(constant, [1.5, 2])
    np.testing.assert_array_equal(array, [0, 1, 2])


class Own:
    pass


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({1, 2}, "a set"),
        (Own(), "a Own"),
        ([1, (Own,)], "a type"),
        ({"a": {"b": lambda: 0}}, "a function"),
        (np.array(["a"]), "an array of dtype <U1"),
        (np.array([Own()]), "an array of dtype object"),
        (np.datetime64("2020"), "an array of dtype datetime64"),
        (range(3), "a range"),
        (1j, "a complex"),
        (bytearray(b"a"), "a bytearray"),
    ],
)
def test_everything_else_is_refused(value, found):
    with pytest.raises(DataError, match=rf"The loader holds {found}.*without pickle\. Have its state be made of None"):
        encode(value, "The loader")


@pytest.mark.parametrize(
    "value",
    [
        {"pickle": np.frombuffer(pickle.dumps(Own()), np.uint8)},
        {"os.system": "true"},
        {"list": [1], "tuple": [1]},
        {},
        {"tuple": [{"exec": "1"}]},
    ],
)
def test_what_was_never_written_is_refused(value):
    with pytest.raises(DataError, match="which stands for no value"):
        decode(value)
