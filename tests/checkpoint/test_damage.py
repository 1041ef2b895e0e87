"""`load_checkpoint` finds damage in any byte, and then uses the last good checkpoint."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest

import handloom as hl
from handloom.checkpoint.store import valid_steps
from handloom.errors import HandloomWarning
from tests.checkpoint.common import ARRAYS, CONTENTS, FILES, MANIFEST, flip, forge, forge_file, header_size, is_of, save

pytestmark = pytest.mark.once


@pytest.fixture
def run(tmp_path):
    """A directory of two checkpoints, the second to be damaged."""
    for step in (1, 2):
        save(tmp_path, step, metrics={"loss": 1.0})
    return tmp_path


@pytest.fixture
def second(run):
    return run / "step_000000002"


def warned(run):
    """Loads from the directory: the text of the warning, if the first checkpoint was loaded, else nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hl.load_checkpoint(run)
    if not is_of(found, 1):
        return ""
    [warning] = caught
    assert (warning.category, warning.filename) == (HandloomWarning, __file__)
    assert str(warning.message).startswith("Skipping damaged checkpoint step_000000002; using step_000000001. ")
    return str(warning.message)


def array_at(path, position):
    """The array that a byte of a file belongs to."""
    header = json.loads(path.read_bytes()[8 : header_size(path)])
    [name] = [
        name
        for name, entry in header.items()
        if entry["data_offsets"][0] <= position - header_size(path) < entry["data_offsets"][1]
    ]
    return name


@pytest.mark.parametrize("kind", ["header", "data", CONTENTS, MANIFEST])
def test_load_checkpoint_finds_a_flipped_bit_in_any_byte_and_names_its_place(run, second, kind):
    path = second / (ARRAYS if kind in ("header", "data") else kind)
    size = path.stat().st_size
    begin = header_size(path) if path.name == ARRAYS else 0
    where = {"header": range(begin), "data": range(begin, size)}.get(kind, range(size))
    bits = np.random.default_rng(0).integers(8, size=len(where))
    for position, bit in zip(where, map(int, bits), strict=True):
        flip(path, position, bit)
        message = warned(run)
        flip(path, position, bit)
        assert f"{path} is damaged" in message or f"{path} cannot be used. The manifest is damaged" in message, position
        if kind == "data":
            assert f"the array {array_at(path, position)!r} changed" in message
        if kind == "header":
            assert "its header changed" in message
    assert is_of(hl.load_checkpoint(run), 2)


@pytest.mark.parametrize("name", FILES)
def test_load_checkpoint_finds_a_file_that_is_cut_off_or_too_long(run, second, name):
    path = second / name
    data = path.read_bytes()
    for size in {0, 1, 7, 8, 9, *range(0, len(data), 13), len(data) - 1}:
        path.write_bytes(data[:size])
        assert str(path) in warned(run)
    for more in (b"\0", b" ", b"x" * 10000):
        path.write_bytes(data + more)
        assert str(path) in warned(run)
    path.unlink()
    assert f"{path} cannot be opened: No such file" in warned(run)


def test_load_checkpoint_names_the_arrays_that_are_cut_off(run, second):
    (second / ARRAYS).write_bytes((second / ARRAYS).read_bytes()[:-1])
    assert re.search(r"it has \d+ bytes; \d+ were written. Bytes of 'model.mask' are missing", warned(run))


@pytest.mark.parametrize("name", FILES)
def test_load_checkpoint_finds_a_file_of_another_checkpoint(run, second, name):
    shutil.copy(run / "step_000000001" / name, second / name)
    assert "step_000000002" in warned(run)


def test_load_checkpoint_compares_the_step_with_the_name_of_the_directory(run, second):
    shutil.copytree(second, run / "the best of them")
    assert is_of(hl.load_checkpoint(run / "the best of them"), 2)
    shutil.rmtree(second)
    shutil.copytree(run / "step_000000001", second)
    assert "holds the checkpoint of step 1, not of 2. [HL541]" in warned(run)


@pytest.mark.parametrize("field", ["step", "tensors", "model.dense.bias"])
def test_load_checkpoint_refuses_a_name_given_twice_in_the_manifest(run, second, field):
    def twice(record):
        value = record["tensors"].get(field, record.get(field))
        entry = f'"{field}":{json.dumps(value, separators=(",", ":"))}'
        text = json.dumps(record, separators=(",", ":"))
        assert entry in text
        return text.replace(entry, f"{entry},{entry}").encode()

    forge(second, twice)
    assert f"the name {field!r} is given twice" in warned(run)


def test_load_checkpoint_refuses_a_name_given_twice_in_the_header_of_safetensors(run, second):
    data, begin = (second / ARRAYS).read_bytes(), header_size(second / ARRAYS)
    entry = re.search(rb'"model.mask":{.*?},?', data)[0].rstrip(b",")
    table = data[8:begin].rstrip().replace(entry, entry + b"," + entry)
    forge_file(second, ARRAYS, len(table).to_bytes(8, "little") + table + data[begin:])
    assert warned(run)


def test_load_checkpoint_names_three_of_many_damaged_arrays(run, second):
    path, begin = second / ARRAYS, header_size(second / ARRAYS)
    data = path.read_bytes()
    path.write_bytes(data[:begin] + bytes(255 - byte for byte in data[begin:]))
    assert re.search("the array 'model.dense.bias', the array .*, the array .* and 1 more changed", warned(run))


def test_valid_steps_leaves_out_checkpoints_with_cut_off_files(run, second):
    assert valid_steps(run) == [1, 2]
    (second / ARRAYS).write_bytes(b"")
    assert valid_steps(run) == [1]
