"""`Draft` and its readers: arrays and JSON values come back bitwise identical."""

import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from handloom.checkpoint import filesystem
from handloom.checkpoint.dtypes import CODES, dtype_of, is_finite
from handloom.checkpoint.format import read_arrays, read_contents, read_manifest, verify
from handloom.errors import CheckpointError
from tests.checkpoint.common import ARRAYS, FILES, Shim, arrays, contents, draft_of, header_size, same_bytes

pytestmark = pytest.mark.once

NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1, max_size=12).filter(
    lambda name: ".." not in name and name != "__metadata__"
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**130), 2**130)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def any_array(draw):
    """An array of any bits, with NaNs of every kind, in any order in memory."""
    dtype, shape = dtype_of(draw(st.sampled_from(sorted(CODES)))), draw(SHAPES)
    size = int(np.prod(shape))
    if dtype.name == "bool":
        return draw(hnp.arrays(bool, shape))
    array = np.frombuffer(draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), dtype)
    array = array.reshape(shape)
    return draw(st.sampled_from([array, array.T, np.asfortranarray(array)]))


def written(directory, arrays=None, contents=None):
    draft_of(arrays, contents, {"loss": 0.5}).write(directory)
    return directory


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(NAMES, any_array(), max_size=5), values=st.dictionaries(st.text(max_size=4), JSON))
def test_draft_is_read_as_it_was_written(tmp_path_factory, state, values):
    directory = written(tmp_path_factory.mktemp("checkpoint"), state, values)
    manifest = verify(directory)
    found = read_arrays(directory, manifest)
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert same_bytes(found[name], array)
        assert (manifest.tensors[name].shape, manifest.tensors[name].dtype) == (array.shape, array.dtype.name)
    assert repr(read_contents(directory, manifest)) == repr(values)  # By repr, as -0.0 == 0.0 and True == 1.


def test_draft_writes_arrays_that_safetensors_reads_aligned(tmp_path):
    state = arrays(1) | {"half": np.arange(5).astype(ml_dtypes.bfloat16), "ünï": np.ones(3, "uint16")}
    data = (written(tmp_path, state) / ARRAYS).read_bytes()
    found = dict(safetensors.deserialize(data))
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name]["dtype"] == CODES[array.dtype.name]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()
        assert data.index(array.tobytes(), header_size(tmp_path / ARRAYS)) % array.dtype.itemsize == 0


def test_draft_converts_arrays_of_the_other_byte_order(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    found = read_arrays(written(tmp_path, {"a": values.astype(">f4")}), read_manifest(tmp_path))["a"]
    assert same_bytes(found, values.astype("<f4"))


def test_draft_writes_the_same_bytes_each_time(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, arrays(3), contents(3))
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_draft_writes_everything_if_the_system_writes_only_parts(tmp_path, monkeypatch):
    class Slow(Shim):
        def write(self, file, data):
            return os.write(file, data[:3])

    monkeypatch.setattr(filesystem, "os", Slow(lambda name, arguments: None))
    written(tmp_path, arrays(1))
    found = read_arrays(tmp_path, verify(tmp_path))
    assert all(same_bytes(found[name], array) for name, array in arrays(1).items())


@pytest.mark.parametrize("dtype", ["complex128", "U3", "M8[s]", "int4", "longdouble", "O"])
def test_draft_refuses_dtypes_that_safetensors_lacks(dtype):
    array = np.zeros(2, getattr(ml_dtypes, dtype, dtype))
    if array.dtype.name in CODES:
        pytest.skip("On this machine, it equals another one.")
    with pytest.raises(
        CheckpointError, match=r"The array 'model.w' has the dtype .*, which safetensors does not.*Convert"
    ):
        draft_of({"model.w": array})


def test_draft_refuses_contents_that_are_too_large_to_read():
    with pytest.raises(CheckpointError, match=r"take 70,000,0.. bytes as JSON; at most 67,108,864 .*in arrays"):
        draft_of(contents={"text": "x" * 70_000_000})


def test_draft_takes_contents_of_a_hundred_levels(tmp_path):
    values = {}
    for _ in range(99):
        values = {"a": values}
    assert read_contents(written(tmp_path, contents=values), read_manifest(tmp_path)) == values
    with pytest.raises(CheckpointError, match="more than 100 levels"):
        draft_of(contents={"a": values})


@pytest.mark.parametrize("name", sorted(CODES))
def test_is_finite_knows_every_dtype(name):
    array = np.ones(5).astype(dtype_of(name))
    assert is_finite(array)
    if name.startswith(("float", "bfloat", "complex")):
        array[3] = np.nan
        assert not is_finite(array)
    assert is_finite(np.zeros((0,), dtype_of(name)))


def test_is_finite_finds_one_number_in_millions():
    array = np.zeros((3, 1 << 20), "float32")
    array[2, -1] = np.inf
    assert not is_finite(array)
    assert not is_finite(array.T)
