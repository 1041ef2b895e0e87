"""Arrays in pieces, in several files, are read as whole arrays, or refused if the pieces do not make up the array."""

import itertools
import json

import keras
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import handloom as hl
from handloom._util.shard import Shard
from handloom.checkpoint import snapshot
from handloom.checkpoint.format import Draft, read_arrays, verify
from handloom.checkpoint.names import named
from handloom.distribute import SingleDevice
from handloom.errors import CheckpointError
from tests.checkpoint.common import CONTENTS, MANIFEST, flip, forge, same_bytes, whole
from tests.models import sequential
from tests.numbers import same

ARRAY = np.arange(24, dtype="float32").reshape(4, 6)
FIRST, SECOND = FILES = ("arrays-00001-of-00002.safetensors", "arrays-00002-of-00002.safetensors")


class Half(SingleDevice):
    """Cuts each variable in half along its first axis, if it has one; each of two processes holds one half."""

    size = 2

    def __init__(self, rank):
        self.rank = rank

    def shards_of(self, variable):
        [shard] = super().shards_of(variable)
        if not shard.offset:
            return [shard] if self.rank == 0 else []
        half = len(shard.value) // 2
        begin, end = (0, half) if self.rank == 0 else (half, len(shard.value))
        return [Shard((begin, *shard.offset[1:]), shard.value[begin:end])] if end > begin else []


def a_state(seed):
    model = sequential(layers.Dense(4), layers.BatchNormalization(), layers.Dense(1), inputs=6)
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    for variable in named({"model": model, "optimizer": optimizer})[0].values():
        if len(variable.shape):
            variable.assign(keras.random.normal(variable.shape, seed=seed))
    return {"model": model, "optimizer": optimizer}


def test_restore_on_one_device_reads_the_shards_of_two_ranks(tmp_path):
    state, other = a_state(1), a_state(2)
    parts = []
    for rank in range(2):
        with Half(rank).scope():
            shards, contents = snapshot.take(state, {})
        parts.append(shards if rank == 0 else {name: shards[name] for name in named(state)[0]})  # The rest is rank 0's.
    (tmp_path / "step_000000003").mkdir()
    Draft(3, parts, contents, {}).write(tmp_path / "step_000000003")
    assert {path.name for path in (tmp_path / "step_000000003").iterdir()} == {*FILES, CONTENTS, MANIFEST}
    assert hl.Checkpointer(tmp_path, other).restore() == 3
    for name, variable in named(state)[0].items():
        same(named(other)[0][name], variable)


@pytest.mark.once
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_read_arrays_joins_any_grid_of_pieces_in_any_files(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("checkpoint")
    arrays, parts = {}, [{} for _ in range(data.draw(st.integers(1, 3)))]
    for name in ("a", "b", "empty"):
        shape = data.draw(st.lists(st.integers(0 if name == "empty" else 1, 5), max_size=3))
        dtype = data.draw(st.sampled_from(["float32", "int8", "float64"]))
        array = arrays[name] = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        cuts = [
            sorted({0, size, *data.draw(st.sets(st.integers(1, size - 1), max_size=2))}) if size > 1 else [0, size]
            for size in shape
        ]
        for ranges in itertools.product(*(list(itertools.pairwise(cut)) for cut in cuts)):
            part = data.draw(st.sampled_from(parts))
            piece = array[tuple(slice(*bounds) for bounds in ranges)]
            part.setdefault(name, []).append(Shard(tuple(begin for begin, _ in ranges), piece))
    Draft(1, parts, {}, {}).write(directory)
    manifest = verify(directory)
    found = read_arrays(directory, manifest)
    assert all(same_bytes(found[name], array) for name, array in arrays.items())
    assert len(manifest.files) == len(parts)


@pytest.fixture
def halves(tmp_path):
    """A checkpoint of one array in two files."""
    parts = [{"w": [Shard((0, 0), ARRAY[:, :2])]}, {"w": [Shard((0, 2), ARRAY[:, 2:])]} | whole({"v": ARRAY})]
    Draft(1, parts, {}, {}).write(tmp_path)
    return tmp_path


@pytest.mark.once
def test_draft_names_the_position_of_each_piece_in_safetensors_and_in_the_manifest(halves):
    data = (halves / SECOND).read_bytes()
    found = {name: (entry["shape"], bytes(entry["data"])) for name, entry in safetensors.deserialize(data)}
    assert found == {"w[0:4,2:6]": ([4, 4], ARRAY[:, 2:].tobytes()), "v": ([4, 6], ARRAY.tobytes())}
    record = json.loads((halves / MANIFEST).read_bytes())
    assert record["format"] == 2
    assert [(piece["file"], piece["offset"], piece["shape"]) for piece in record["tensors"]["w"]["pieces"]] == [
        (FIRST, [0, 0], [4, 2]),
        (SECOND, [0, 2], [4, 4]),
    ]


@pytest.mark.once
@pytest.mark.parametrize("name", FILES)
def test_verify_names_file_and_array_that_are_damaged(halves, name):
    flip(halves / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: the array 'w' changed"):
        verify(halves)
    (halves / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be opened"):
        verify(halves)


def piece(record, number):
    return record["tensors"]["w"]["pieces"][number]


@pytest.mark.once
@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["tensors"]["w"]["pieces"].pop(),
        lambda record: record["tensors"]["w"]["pieces"].append(piece(record, 0)),
        lambda record: piece(record, 1).update(offset=[0, 0]),
        lambda record: piece(record, 1).update(offset=[0, 1]),
        lambda record: piece(record, 1).update(offset=[1, 2]),
        lambda record: piece(record, 1).update(shape=[4, 3]),
        lambda record: record["tensors"]["w"].update(shape=[4, 7]),
        lambda record: record["tensors"]["w"].update(shape=[24]),
    ],
)
def test_verify_refuses_pieces_that_do_not_make_up_their_array(halves, change):
    forge(halves, change)
    with pytest.raises(CheckpointError, match="The array 'w' has pieces that do not make up its shape"):
        verify(halves)
