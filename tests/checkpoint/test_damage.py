"""Damage is found, whatever byte it is in, and the last good checkpoint is loaded."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest

import handloom as hl
from handloom.checkpoint.store import read, valid_steps
from handloom.errors import CheckpointError, HandloomWarning
from tests.checkpoint.common import forge, forge_file, is_of, save

pytestmark = pytest.mark.once

ARRAYS, CONTENTS, MANIFEST = FILES = ("arrays.safetensors", "contents.json", "manifest.json")


@pytest.fixture
def run(tmp_path):
    """A directory of two checkpoints, the second to be damaged."""
    for step in (1, 2):
        save(tmp_path, step, metrics={"loss": 1.0})
    return tmp_path


def warned(run):
    """Loads from the directory; what the warning said, if the first checkpoint was loaded, else nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hl.load_checkpoint(run)
    if not is_of(found, 1):
        return ""
    [warning] = caught
    assert warning.category is HandloomWarning
    assert "step_000000002 is passed over for step_000000001" in str(warning.message)
    return str(warning.message)


def tensor_at(run, position):
    """The array whose bytes a position in the file is among."""
    tensors = json.loads((run / "step_000000002" / MANIFEST).read_bytes())["tensors"]
    pieces = {name: tensor["pieces"][0] for name, tensor in tensors.items()}
    begin = len((run / "step_000000002" / ARRAYS).read_bytes()) - max(piece["stop"] for piece in pieces.values())
    [name] = [name for name, piece in pieces.items() if piece["start"] <= position - begin < piece["stop"]]
    return name


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def positions(run, kind):
    path = run / "step_000000002" / (ARRAYS if kind in ("header", "data") else kind)
    size = path.stat().st_size
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.name == ARRAYS else size
    return path, {"header": range(begin), "data": range(begin, size)}.get(kind, range(size))


@pytest.mark.parametrize("kind", ["header", "data", CONTENTS, MANIFEST])
def test_a_flipped_bit_in_any_byte_is_found_and_its_place_named(run, kind):
    path, where = positions(run, kind)
    bits = np.random.default_rng(0).integers(8, size=len(where))
    for position, bit in zip(where, map(int, bits), strict=True):
        flip(path, position, bit)
        message = warned(run)
        flip(path, position, bit)
        assert f"{path} is damaged" in message or f"{path}: It is damaged" in message, position
        if kind == "data":
            assert f"the array {tensor_at(run, position)!r} is not as written" in message
        if kind == "header":
            assert "its header is not as written" in message
    assert is_of(hl.load_checkpoint(run), 2)


def test_two_hundred_flipped_bits_anywhere_are_all_found(run):
    random = np.random.default_rng(1)
    for _ in range(200):
        path = run / "step_000000002" / FILES[random.integers(3)]
        position, bit = int(random.integers(path.stat().st_size)), int(random.integers(8))
        flip(path, position, bit)
        assert path.name in warned(run)
        flip(path, position, bit)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_found(run, name):
    path = run / "step_000000002" / name
    data = path.read_bytes()
    for size in {0, 1, 7, 8, 9, *range(0, len(data), 13), len(data) - 1}:
        path.write_bytes(data[:size])
        assert str(path) in warned(run)


def test_a_tensor_that_is_cut_off_is_named(run):
    path = run / "step_000000002" / ARRAYS
    path.write_bytes(path.read_bytes()[:-1])
    assert re.search(r"it has \d+ bytes, of \d+ .* Of it, the array 'model.mask' is cut off", warned(run))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("more", [b"\0", b" ", b"x" * 10000])
def test_a_file_with_more_at_its_end_is_found(run, name, more):
    path = run / "step_000000002" / name
    path.write_bytes(path.read_bytes() + more)
    assert str(path) in warned(run)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, name):
    (run / "step_000000002" / name).unlink()
    assert f"{run / 'step_000000002' / name} cannot be opened: No such file" in warned(run)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(run, name):
    shutil.copy(run / "step_000000001" / name, run / "step_000000002" / name)
    assert "step_000000002" in warned(run)


@pytest.mark.parametrize(("one", "other"), [(ARRAYS, CONTENTS), (CONTENTS, MANIFEST), (ARRAYS, MANIFEST)])
def test_files_that_changed_places_are_found(run, one, other):
    folder = run / "step_000000002"
    (folder / one).rename(folder / "third")
    (folder / other).rename(folder / one)
    (folder / "third").rename(folder / other)
    assert warned(run)


def test_a_whole_checkpoint_under_the_name_of_another_is_found(run):
    shutil.rmtree(run / "step_000000002")
    shutil.copytree(run / "step_000000001", run / "step_000000002")
    assert "holds the checkpoint of step 1, and not of the one in its name" in warned(run)


def test_a_copy_under_a_name_of_ones_own_is_loaded(run):
    shutil.copytree(run / "step_000000002", run / "the best of them")
    assert is_of(hl.load_checkpoint(run / "the best of them"), 2)


@pytest.mark.parametrize("field", ["step", "tensors", "model.dense.bias"])
def test_a_name_given_twice_in_the_manifest_is_found(run, field):
    def twice(record):
        value = record["tensors"].get(field, record.get(field))
        entry = f'"{field}":{json.dumps(value, separators=(",", ":"))}'
        text = json.dumps(record, separators=(",", ":"))
        assert entry in text
        return text.replace(entry, f"{entry},{entry}").encode()

    forge(run / "step_000000002", twice)
    assert f"the name {field!r} is given twice" in warned(run)


def test_a_name_given_twice_in_the_contents_is_found(run):
    forge_file(run / "step_000000002", CONTENTS, b'{"a":1,"a":1}')
    assert "contents.json is not JSON that can be read: the name 'a' is given twice" in warned(run)


def test_a_name_given_twice_in_the_header_of_safetensors_is_found(run):
    folder = run / "step_000000002"
    data = (folder / ARRAYS).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entry = re.search(rb'"model.mask":{.*?},?', data)[0].rstrip(b",")
    table = data[8:begin].rstrip().replace(entry, entry + b"," + entry)
    forge_file(folder, ARRAYS, len(table).to_bytes(8, "little") + table + data[begin:])
    assert warned(run)


def test_damage_is_found_in_a_checkpoint_asked_for_by_name(run):
    path, where = positions(run, "data")
    flip(path, where[0], 0)
    with pytest.raises(CheckpointError, match=r"arrays.safetensors is damaged: the array 'model.dense.bias'"):
        read(run / "step_000000002")
    with pytest.raises(CheckpointError, match=r"arrays.safetensors is damaged: the array 'model.dense.bias'"):
        hl.load_checkpoint(run / "step_000000002")


def test_what_is_evidently_damaged_is_not_among_the_steps(run):
    assert valid_steps(run) == [1, 2]
    (run / "step_000000002" / ARRAYS).write_bytes(b"")
    assert valid_steps(run) == [1]


def test_of_many_damaged_tensors_three_are_named(run):
    path, where = positions(run, "data")
    data = path.read_bytes()
    path.write_bytes(data[: where[0]] + bytes(255 - byte for byte in data[where[0] :]))
    assert re.search("the array 'model.dense.bias', the array .*, the array .* and 1 more are not", warned(run))
