"""Arrays and JSON values come back as they were, to the last bit."""

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
from tests.checkpoint.common import Shim, arrays, contents, draft_of, install, same

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
    """An array of any bits: NaNs of every kind among them; in memory in any order."""
    dtype, shape = dtype_of(draw(st.sampled_from(sorted(CODES)))), draw(SHAPES)
    size = int(np.prod(shape))
    if dtype.name == "bool":
        return draw(hnp.arrays(bool, shape))
    array = np.frombuffer(draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), dtype)
    array = array.reshape(shape)
    return draw(st.sampled_from([array, array.T, np.asfortranarray(array)]))


def written(directory, step=7, arrays=None, contents=None, metrics=None):
    draft_of(arrays, contents, metrics, step).write(directory)
    return directory


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(NAMES, any_array(), max_size=5), values=st.dictionaries(st.text(max_size=4), JSON))
def test_whatever_is_saved_comes_back(tmp_path_factory, state, values):
    directory = written(tmp_path_factory.mktemp("checkpoint"), arrays=state, contents=values)
    manifest = verify(directory)
    found = read_arrays(directory, manifest)
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert same(found[name], array)
        assert manifest.shapes[name] == (array.shape, array.dtype.name)
    assert repr(read_contents(directory, manifest)) == repr(values)  # By repr, as -0.0 == 0.0 and True == 1.


def test_any_reader_of_safetensors_reads_the_arrays(tmp_path):
    state = arrays(1) | {"half": np.arange(5).astype(ml_dtypes.bfloat16), "ünï": np.ones(3, "uint16")}
    data = (written(tmp_path, arrays=state) / "arrays.safetensors").read_bytes()
    found = dict(safetensors.deserialize(data))
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name]["dtype"] == CODES[array.dtype.name]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


def test_tensors_lie_where_their_numbers_are_aligned(tmp_path):
    state = {
        f"{name}-{size}": np.zeros(size, name) for name in ("int8", "float16", "float64", "bool") for size in (1, 3)
    }
    data = (written(tmp_path, arrays=state) / "arrays.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0
    for tensor in read_manifest(tmp_path).tensors.values():
        assert tensor.pieces[0].start % dtype_of(tensor.dtype).itemsize == 0


def test_numbers_of_the_other_byte_order_are_turned(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    found = read_arrays(written(tmp_path, arrays={"a": values.astype(">f4")}), read_manifest(tmp_path))["a"]
    assert same(found, values.astype("<f4"))


def test_a_checkpoint_is_the_same_bytes_each_time(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, arrays=arrays(3), contents=contents(3), metrics={"loss": 0.5})
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_write_that_the_system_does_in_pieces_is_whole(tmp_path, monkeypatch):
    class Slow(Shim):
        def write(self, file, data):
            return _files_os.write(file, data[:3])

    _files_os = filesystem.os
    monkeypatch.setattr(filesystem, "os", Slow(lambda name, arguments: None))
    written(tmp_path, arrays=arrays(1), contents=contents(1))
    found = read_arrays(tmp_path, verify(tmp_path))
    assert all(same(found[name], array) for name, array in arrays(1).items())


@pytest.mark.parametrize("dtype", ["complex128", "U3", "M8[s]", "int4", "longdouble"])
def test_a_type_that_safetensors_has_not_is_an_error_by_name(dtype):
    array = np.zeros(2, getattr(ml_dtypes, dtype, dtype))
    if array.dtype.name in CODES:
        pytest.skip("Here it is the same as another.")
    with pytest.raises(CheckpointError, match=r"The array 'model.w' is of type .*, which safetensors has not. Turn it"):
        draft_of({"model.w": array})


@pytest.mark.parametrize("name", ["arrays.safetensors", "contents.json", "manifest.json"])
def test_what_is_read_back_is_compared_byte_by_byte(name, tmp_path):
    """A disk that turns one bit of one file, whichever it is, and says nothing."""

    def turn(call, arguments):
        path = tmp_path / name
        if call == "fsync" and path.exists() and os.path.samestat(os.fstat(arguments[0]), path.stat()):
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    install(turn)
    try:
        with pytest.raises(CheckpointError, match=rf"{name}:? (It )?is damaged"):
            written(tmp_path, arrays=arrays(1), contents=contents(1))
    finally:
        install(None)


def test_contents_too_large_to_be_read_again_are_not_written():
    with pytest.raises(CheckpointError, match=r"take 70,000,0.. bytes as JSON, of 67,108,864.*belongs in arrays"):
        draft_of(contents={"text": "x" * 70_000_000})


def test_a_hundred_levels_are_written_and_read(tmp_path):
    values = {}
    for _ in range(98):
        values = {"a": values}
    values = {"a": values}
    assert read_contents(written(tmp_path, contents=values), read_manifest(tmp_path)) == values
    with pytest.raises(CheckpointError, match="more than 100 levels"):
        draft_of(contents={"a": values})


@pytest.mark.parametrize("name", sorted(CODES))
def test_what_is_finite_is_told_of_every_type(name):
    array = np.ones(5).astype(dtype_of(name))
    assert is_finite(array)
    if name.startswith(("float", "bfloat", "complex")):
        array[3] = np.nan
        assert not is_finite(array)
    assert is_finite(np.zeros((0,), dtype_of(name)))


def test_one_number_in_millions_is_found():
    array = np.zeros((3, 1 << 20), "float32")
    array[2, -1] = np.inf
    assert not is_finite(array)
    assert not is_finite(array.T)
