"""Malicious files are refused: nothing is run, followed, written elsewhere, or allocated."""

import json
import os
import pickle
import threading
import tracemalloc

import numpy as np
import pytest

import handloom as hl
from handloom.checkpoint.store import Store
from handloom.errors import CheckpointError
from tests.checkpoint.common import ARRAYS, CONTENTS, FILES, MANIFEST, draft_of, flip, forge, forge_file, is_of, save

pytestmark = pytest.mark.once


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path / "run", 1)
    return tmp_path / "run" / "step_000000001"


@pytest.fixture
def elsewhere(tmp_path):
    """A file that no checkpoint may change."""
    (tmp_path / "elsewhere").mkdir()
    kept = tmp_path / "elsewhere" / "kept"
    kept.write_text("kept")
    yield kept
    assert kept.read_text() == "kept"


@pytest.fixture(autouse=True)
def _nothing_written_and_little_allocated(tmp_path):
    """No test may create files, or take more than twice the memory of valid files of this size."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "elsewhere"}
    assert peak < 8 << 20


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def refused(path, words):
    with pytest.raises(CheckpointError, match=words):
        hl.load_checkpoint(path)


def tensor(record):
    return record["tensors"]["model.dense.kernel"]


def piece(record):
    [found] = tensor(record)["pieces"]
    return found


# ---------------------------------------------------------------- names and links

BAD_NAMES = [
    *("../../x", "a/../b", "/etc/passwd", "..\\x", "\\\\host\\x", "", "a\nb", "\x1b[2J", "__metadata__", "x" * 5000)
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_load_checkpoint_and_draft_refuse_names_that_climb_or_spoil_a_terminal(checkpoint, name):
    forge(checkpoint, lambda record: record["tensors"].update({name: record["tensors"].pop("model.mask")}))
    refused(checkpoint, "is not a valid name for an array")
    for options in ({"arrays": {name: np.zeros(1)}}, {"metrics": {name: 1.0}}):
        with pytest.raises(CheckpointError, match=r"is not a valid name for an array or a metric\..*HL525"):
            draft_of(**options)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "other.safetensors"])
def test_load_checkpoint_opens_no_file_that_a_manifest_names(checkpoint, name):
    forge(checkpoint, lambda record: record["files"].update({name: 0}))
    refused(checkpoint, "is listed, which is not a name for a file of arrays")
    forge(checkpoint, lambda record: record["files"].pop(name) or piece(record).update(file=name))
    refused(checkpoint, "Arrays are in .*; files are")


@pytest.mark.parametrize("name", FILES)
def test_load_checkpoint_refuses_anything_but_a_regular_file_with_one_name(checkpoint, elsewhere, name):
    os.link(checkpoint / name, elsewhere.with_name("second"))
    refused(checkpoint, f"{name} is one of 2 names .hard links. of a file.*Copy the checkpoint")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(elsewhere.with_name("second"))
    refused(checkpoint, f"{name} is a symbolic link; links in checkpoints are not followed. Replace it with a copy")
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, f"{name} is not a regular file")
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    refused(checkpoint, f"{name} is not a regular file")


def test_load_checkpoint_follows_a_link_to_the_directory_but_not_to_a_checkpoint(checkpoint, tmp_path):
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    assert is_of(hl.load_checkpoint(tmp_path / "elsewhere"), 1)
    (tmp_path / "elsewhere").unlink()
    checkpoint.rename(tmp_path / "elsewhere")
    checkpoint.symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, f"step_000000001 is a symbolic link; .* Use the path {tmp_path / 'elsewhere'}")
    refused(tmp_path / "run", "There is no checkpoint")  # In a directory, links do not count.


@pytest.mark.parametrize("name", [".writing", ".removing", "step_000000000"])
def test_store_removes_nothing_through_a_link(checkpoint, tmp_path, elsewhere, name):
    (tmp_path / "run" / name).symlink_to(elsewhere.parent)
    try:
        save(tmp_path / "run", 2, keep=1)
    except CheckpointError as error:
        assert "written" in str(error)  # noqa: PT017 - a link of that name may be in the way.


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_store_writes_its_lock_through_no_link(checkpoint, tmp_path, elsewhere, link):
    (tmp_path / "run" / ".lock").unlink()
    link(elsewhere, tmp_path / "run" / ".lock")
    with pytest.raises(CheckpointError):
        Store(tmp_path / "run").open()


# ----------------------------------------------------------------- fields of a manifest

SIZES = {
    "step": lambda record, value: record.update(step=value),
    "crc32": lambda record, value: piece(record).update(crc32=value),
    "bytes": lambda record, value: record["contents"].update(bytes=value),
    ARRAYS: lambda record, value: record["files"].update({ARRAYS: value}),
}


@pytest.mark.parametrize("value", [-1, 2**80, 1.0, float("nan"), True, "1", None, []])
@pytest.mark.parametrize("field", SIZES)
def test_load_checkpoint_refuses_numbers_that_are_not_sizes(checkpoint, field, value):
    forge(checkpoint, lambda record: SIZES[field](record, value))
    refused(checkpoint, rf"has {field}=.*; expected a whole number from 0 to 4611686018427387903\. \[HL528\]")


BAD_SHAPES = [
    *([-5, -7], [-1], [5.0, 7.0], [True], ["5", 7], [None], [[5], 7], [float("nan")], [float("inf")], [10**30]),
    *([1] * 33, {"0": 5}, "57", None),
]


@pytest.mark.parametrize("value", BAD_SHAPES)
@pytest.mark.parametrize(("field", "of"), [("shape", tensor), ("shape", piece), ("offset", piece)])
def test_load_checkpoint_refuses_shapes_and_offsets_that_are_not_sizes(checkpoint, field, of, value):
    forge(checkpoint, lambda record: of(record).update({field: value}))
    refused(checkpoint, rf"The array 'model.dense.kernel' has {field}=.*; expected a list of at most 32 whole numbers")


def replaced(value):
    return lambda record: record["tensors"].update({"model.dense.kernel": value})


def with_fields(of, **fields):
    return lambda record: of(record).update(fields)


def without(field):
    return lambda record: record.pop(field)


def itself(record):
    return record


OF_KERNEL = "The array 'model.dense.kernel' has"
FORGED = [
    *((with_fields(tensor, shape=shape), "too large for any memory") for shape in ([2**40, 2**40], [2**61])),
    (with_fields(tensor, shape=[5, 7, 0, 2**61]), "too large for any memory"),
    (with_fields(piece, offset=[0]), OF_KERNEL),
    (with_fields(piece, offset=[1, 0]), OF_KERNEL),
    *((with_fields(tensor, pieces=pieces), OF_KERNEL) for pieces in ([], {}, [None])),
    (with_fields(piece, file=7), OF_KERNEL),
    *(
        (with_fields(tensor, dtype=dtype), OF_KERNEL)
        for dtype in ("object", "O", "complex128", "|V1000000", "float32,float64", "os.system", 7, None, ("f4",))
    ),
    *((replaced(value), OF_KERNEL) for value in (None, [], "x", {})),
    *(
        (with_fields(lambda record: record["metrics"], loss=loss), "The manifest has loss=.*; expected a finite number")
        for loss in (float("nan"), float("inf"), 10**400, "0.1", True, [], {})
    ),
    *(
        (change, f"The manifest has {field}=|The format is")
        for field in ("format", "step", "metrics", "files", "contents", "tensors")
        for change in (without(field), *(with_fields(itself, **{field: value}) for value in (None, [], 2.5)))
    ),
    (
        with_fields(lambda record: record["contents"], sha256="0" * 63),
        "contents.json has sha256=.*; expected 64 hexadecimal digits",
    ),
]


@pytest.mark.parametrize(("change", "words"), FORGED)
def test_load_checkpoint_refuses_manifests_with_invalid_fields(checkpoint, change, words):
    forge(checkpoint, change)
    refused(checkpoint, words)


def test_load_checkpoint_names_the_format_of_a_later_version(checkpoint):
    forge(checkpoint, lambda record: record.update(format=3))
    refused(checkpoint, r"The format is 3; this Handloom reads formats 1 to 2\. A later version")


def test_load_checkpoint_refuses_a_huge_array_before_it_allocates_memory(checkpoint):
    def huge(record):
        for found in (tensor(record), piece(record)):
            found.update(shape=[2**36, 4])

    forge(checkpoint, huge)
    refused(checkpoint, "is listed with 575 bytes; its arrays take 1,?099,?5")
    forge(checkpoint, lambda record: record["files"].update({ARRAYS: 1099511628223}))
    refused(checkpoint, "is listed with|is damaged: it has 575 bytes; 1,099,5")


def test_load_checkpoint_refuses_bytes_that_belong_to_no_array(checkpoint):
    forge_file(checkpoint, ARRAYS, (checkpoint / ARRAYS).read_bytes() + b"hidden")
    refused(checkpoint, "arrays.safetensors is listed with 581 bytes; its arrays take 575")


def test_load_checkpoint_compares_dtypes_with_the_header(checkpoint):
    forge(checkpoint, lambda record: tensor(record).update(dtype="int32"))
    refused(checkpoint, "is damaged: its header")


def test_load_checkpoint_takes_no_more_memory_than_the_arrays(tmp_path):
    large = {f"w{index}": np.ones((256, 1024), "float32") for index in range(6)}  # 6 MB; the fixture allows 8.
    store = Store(tmp_path / "run")
    store.save(draft_of(large, step=1))
    store.close()
    size = sum(array.nbytes for array in large.values())
    del large
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    found = hl.load_checkpoint(tmp_path / "run")
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before < 1.4 * size  # One megabyte is the read buffer.
    assert len(found.arrays) == 6


# ------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("depth", [101, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_load_checkpoint_refuses_deep_json(checkpoint, depth, opening, closing):
    deep = b'{"a":' + opening * depth + b"1" + closing * depth + b"}"
    words = "is nested in more than 100 levels|cannot be decoded as JSON: maximum recursion"
    forge_file(checkpoint, CONTENTS, deep)
    refused(checkpoint, f"contents.json ({words})")
    forge(checkpoint, lambda record: deep)
    refused(checkpoint, f"manifest.json cannot be used. The manifest ({words})")


@pytest.mark.parametrize("name", [CONTENTS, MANIFEST])
def test_load_checkpoint_refuses_huge_json_by_its_size_alone(checkpoint, name):
    limit = 64 << 20
    with (checkpoint / name).open("r+b") as file:
        file.truncate(limit + 1)
    if name == CONTENTS:
        forge(checkpoint, lambda record: record["contents"].update(bytes=limit + 1))
    refused(checkpoint, f"{name} has {limit + 1:,} bytes; the limit is {limit:,}")


@pytest.mark.parametrize(
    "data",
    [b"[]", b"1", b"null", b"", b"{", b'{"a":}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}", b'{"a":1,"a":1}'],
)
def test_load_checkpoint_refuses_contents_that_are_not_an_object(checkpoint, data):
    forge_file(checkpoint, CONTENTS, data)
    refused(checkpoint, "contents.json (cannot be decoded as JSON|is not a JSON object)")


def test_load_checkpoint_refuses_a_number_of_five_thousand_digits(checkpoint):
    forge(checkpoint, lambda record: json.dumps(record).replace('"step": 1', f'"step": 1{"0" * 5000}').encode())
    refused(checkpoint, "The manifest cannot be decoded as JSON")


# ---------------------------------------------------------------------- pickle


@pytest.mark.parametrize("name", FILES)
def test_load_checkpoint_runs_no_pickle(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == MANIFEST:
        (checkpoint / name).write_bytes(pickle.dumps(Trap()))
    else:
        forge_file(checkpoint, name, pickle.dumps(Trap()))
    refused(checkpoint, name)
    assert not (tmp_path / "sprung").exists()


def test_load_checkpoint_returns_the_bytes_that_it_has_verified(checkpoint):
    """A file that changes while it is read is damaged, or read as it was."""
    stop = threading.Event()

    def change():
        while not stop.is_set():
            flip(checkpoint / ARRAYS)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(100):
            try:
                assert is_of(hl.load_checkpoint(checkpoint), 1)
            except CheckpointError:
                continue
    finally:
        stop.set()
        thread.join()


def test_load_checkpoint_loads_a_forged_checkpoint_without_changes(checkpoint):
    forge(checkpoint, lambda record: None)
    forge_file(checkpoint, CONTENTS, (checkpoint / CONTENTS).read_bytes())
    assert is_of(hl.load_checkpoint(checkpoint), 1)
