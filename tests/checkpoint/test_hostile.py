"""Files made to do harm are refused: nothing is run, followed, written elsewhere, or allocated."""

import json
import os
import pickle
import shutil
import threading
import tracemalloc

import numpy as np
import pytest

import handloom as hl
from handloom.checkpoint.store import Store
from handloom.errors import CheckpointError
from tests.checkpoint.common import arrays, draft_of, forge, forge_file, is_of, save

pytestmark = pytest.mark.once

ARRAYS, CONTENTS, MANIFEST = FILES = ("arrays.safetensors", "contents.json", "manifest.json")


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path / "run", 1)
    return tmp_path / "run" / "step_000000001"


@pytest.fixture(autouse=True)
def _nothing_written_and_little_allocated(tmp_path):
    """Whatever is read: no new file, and less memory than twice what honest files of this size take."""
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


# ----------------------------------------------------------------------- names

BAD_NAMES = [
    "../../x",
    "a/../b",
    "/etc/passwd",
    "..\\x",
    "\\\\host\\x",
    "",
    "a\nb",
    "\x1b[2J",
    "__metadata__",
    "x" * 5000,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_would_climb_or_spoil_a_terminal_are_refused(checkpoint, name):
    forge(checkpoint, lambda record: record["tensors"].update({name: record["tensors"].pop("model.mask")}))
    refused(checkpoint, "is no name for an array")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_they_are_not_saved_either(name):
    with pytest.raises(CheckpointError, match="is no name for an array or a metric"):
        draft_of({name: np.zeros(1)})
    with pytest.raises(CheckpointError, match="is no name for an array or a metric"):
        draft_of(metrics={name: 1.0})


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "other.safetensors"])
def test_no_file_is_opened_because_a_file_names_it(checkpoint, name):
    forge(checkpoint, lambda record: record["files"].update({name: record["files"].pop(ARRAYS)}))
    refused(checkpoint, "It lists .* as a file of arrays")
    forge(checkpoint, lambda record: record["files"].update({ARRAYS: record["files"].pop(name)}))
    forge(checkpoint, lambda record: piece(record).update(file=name))
    refused(checkpoint, "Its arrays are in .*, its files are")


# ----------------------------------------------------------------------- links


@pytest.mark.parametrize("name", FILES)
def test_a_symbolic_link_in_the_place_of_a_file_is_refused(checkpoint, tmp_path, name):
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, f"{name} is a symbolic link; none is followed in a checkpoint. Put a copy in its")


def test_a_symbolic_link_in_the_place_of_a_checkpoint_is_refused(checkpoint, tmp_path):
    checkpoint.rename(tmp_path / "elsewhere")
    checkpoint.symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, "step_000000001 is a symbolic link; .* Give the path")
    refused(tmp_path / "run", "There is no checkpoint")  # Among others it does not count.


def test_a_link_to_the_directory_of_checkpoints_is_the_users_own(checkpoint, tmp_path):
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    assert is_of(hl.load_checkpoint(tmp_path / "elsewhere"), 1)


@pytest.mark.parametrize("name", FILES)
def test_a_hard_link_is_refused(checkpoint, tmp_path, name):
    os.link(checkpoint / name, tmp_path / "elsewhere")
    refused(checkpoint, f"{name} is one of 2 names .hard links. of the same file; .* Make a copy of the checkpoint")


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_a_directory_is_no_file_and_blocks_nothing(checkpoint, name):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, f"{name} is no regular file")
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    refused(checkpoint, f"{name} is no regular file")


@pytest.mark.parametrize("name", [".writing", ".removing"])
def test_a_writer_that_clears_up_follows_no_link(checkpoint, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    try:
        save(tmp_path / "run", 2, keep=1)
    except CheckpointError as error:
        assert "written" in str(error)  # noqa: PT017 - one of the two is in the way of its own name.
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"


def test_a_checkpoint_to_be_removed_that_is_a_link_does_not_take_its_target_along(checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    (tmp_path / "run" / "step_000000000").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "run", 2, keep=1)
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_lock_writes_through_no_link(checkpoint, tmp_path, link):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "run" / ".lock").unlink()
    link(tmp_path / "elsewhere", tmp_path / "run" / ".lock")
    with pytest.raises(CheckpointError):
        Store(tmp_path / "run").open()
    assert (tmp_path / "elsewhere").read_text() == "kept"


# ----------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "shape",
    [
        [2**40, 2**40],
        [2**62],
        [10**30],
        [-5, -7],
        [-1],
        [5, 7, 0, 2**62],
        [5.0, 7.0],
        [True],
        ["5", 7],
        [None],
        [[5], 7],
        [float("nan")],
        [float("inf")],
        [1] * 33,
        {"0": 5},
        "57",
        None,
    ],
)
def test_shapes_that_cannot_be_are_refused(checkpoint, shape):
    forge(checkpoint, lambda record: tensor(record).update(shape=shape))
    refused(checkpoint, "The array 'model.dense.kernel' has")


@pytest.mark.parametrize("field", ["start", "stop", "crc32"])
@pytest.mark.parametrize("value", [-1, 2**63, 1.0, float("nan"), True, "0", None, []])
def test_places_that_cannot_be_are_refused(checkpoint, field, value):
    forge(checkpoint, lambda record: piece(record).update({field: value}))
    refused(checkpoint, "The array 'model.dense.kernel' has")


@pytest.mark.parametrize("offset", [[1, 0], [0], [0, 0, 0], [-1, 0], None, [0.0, 0], "00"])
def test_places_in_an_array_that_cannot_be_are_refused(checkpoint, offset):
    forge(checkpoint, lambda record: piece(record).update(offset=offset))
    refused(checkpoint, "The array 'model.dense.kernel' has")


@pytest.mark.parametrize("pieces", [[], None, {}, [None], ["arrays.safetensors"], 7])
def test_pieces_that_are_no_records_are_refused(checkpoint, pieces):
    forge(checkpoint, lambda record: tensor(record).update(pieces=pieces))
    refused(checkpoint, "The array 'model.dense.kernel' has")


def test_a_number_of_five_thousand_digits_is_refused(checkpoint):
    forge(checkpoint, lambda record: json.dumps(record).replace('"step": 1', f'"step": 1{"0" * 5000}').encode())
    refused(checkpoint, "manifest.json: It is not JSON that can be read")


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, float("nan"), True, "7", None])
@pytest.mark.parametrize("name", [ARRAYS, CONTENTS])
def test_sizes_of_files_that_cannot_be_are_refused(checkpoint, name, value):
    changed = {"contents": {"bytes": value, "sha256": "0" * 64}} if name == CONTENTS else {"files": {ARRAYS: value}}
    forge(checkpoint, lambda record: record.update(changed))
    refused(checkpoint, "which is no size or number that can be")


@pytest.mark.parametrize("step", [-1, 1.0, True, float("nan"), "1", None, 2**80])
def test_a_step_that_cannot_be_is_refused(checkpoint, step):
    forge(checkpoint, lambda record: record.update(step=step))
    refused(checkpoint, "It has step=")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1", True, [], {}])
def test_metrics_that_are_no_numbers_are_refused(checkpoint, value):
    forge(checkpoint, lambda record: record["metrics"].update(loss=value))
    refused(checkpoint, "The metric 'loss' is")


def test_a_huge_tensor_in_a_small_file_is_refused_before_memory_is_asked_for(checkpoint):
    def huge(record):
        more = 2**40 - (piece(record)["stop"] - piece(record)["start"])
        for other in (other["pieces"][0] for other in record["tensors"].values()):
            if other["start"] > piece(record)["start"]:
                other.update(start=other["start"] + more, stop=other["stop"] + more)
        for found in (tensor(record), piece(record)):
            found.update(shape=[2**36, 4])
        piece(record).update(stop=piece(record)["stop"] + more)
        record["files"][ARRAYS] += more

    forge(checkpoint, huge)
    refused(checkpoint, "is said to have|is damaged: it has .* bytes, of 1,099,5")


def test_tensors_that_overlap_or_leave_a_gap_are_refused(checkpoint):
    def move(by):
        def moved(record):
            found = piece(record)
            found.update(start=found["start"] + by, stop=found["stop"] + by)

        forge(checkpoint, moved)

    move(-4)
    refused(checkpoint, "The array 'model.dense.kernel' begins at byte 60, not at 64 after those before")
    move(8)
    refused(checkpoint, "The array 'model.dense.kernel' begins at byte 68, not at 64")


def test_bytes_that_belong_to_no_tensor_are_refused(checkpoint):
    forge_file(checkpoint, ARRAYS, (checkpoint / ARRAYS).read_bytes() + b"hidden")
    refused(checkpoint, "arrays.safetensors is said to have .* bytes; its arrays make it")


@pytest.mark.parametrize(
    "dtype", ["object", "O", "complex128", "|V1000000", "float32,float64", "os.system", 7, None, ["f4"]]
)
def test_types_of_elements_that_are_not_ours_are_refused(checkpoint, dtype):
    forge(checkpoint, lambda record: tensor(record).update(dtype=dtype))
    refused(checkpoint, "is none that a checkpoint holds|which cannot be")


def test_another_type_of_the_same_size_is_damage(checkpoint):
    forge(checkpoint, lambda record: tensor(record).update(dtype="int32"))
    refused(checkpoint, "is damaged: its header is not as written")


def test_an_honest_checkpoint_takes_its_own_size_in_memory(tmp_path):
    large = {f"w{index}": np.ones((256, 1024), "float32") for index in range(6)}  # 6 MB, of 8 that the fixture allows.
    store = Store(tmp_path / "run")
    store.save(draft_of(large, step=1))
    store.close()
    size = sum(array.nbytes for array in large.values())
    del large
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    found = hl.load_checkpoint(tmp_path / "run")
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before < 1.4 * size  # A megabyte of them is the buffer to read with.
    assert len(found.arrays) == 6


# ------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("depth", [101, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_json_is_refused(checkpoint, depth, opening, closing):
    deep = b'{"a":' + opening * depth + b"1" + closing * depth + b"}"
    forge_file(checkpoint, CONTENTS, deep)
    refused(checkpoint, "contents.json is nested in more than 100 levels")
    forge(checkpoint, lambda record: deep)
    refused(checkpoint, "manifest.json: It is nested in more than 100 levels")


@pytest.mark.parametrize(("name", "limit"), [(CONTENTS, 64 << 20), (MANIFEST, 64 << 20)])
def test_huge_json_is_refused_by_its_size_alone(checkpoint, name, limit):
    with (checkpoint / name).open("r+b") as file:
        file.truncate(limit + 1)
    if name == CONTENTS:
        forge(checkpoint, lambda record: record["contents"].update(bytes=limit + 1))
    refused(checkpoint, f"{name} has {limit + 1:,} bytes, of {limit:,} that it may have")


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b"", b"{", b'{"a":}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}"])
def test_contents_that_are_no_object_are_refused(checkpoint, data):
    forge_file(checkpoint, CONTENTS, data)
    refused(checkpoint, "contents.json")


@pytest.mark.parametrize("field", ["format", "step", "metrics", "files", "contents", "tensors"])
@pytest.mark.parametrize("value", ["absent", None, [], 2.5])
def test_a_manifest_without_its_fields_is_refused(checkpoint, field, value):
    forge(checkpoint, lambda record: record.pop(field) if value == "absent" else record.update({field: value}))
    refused(checkpoint, f"{field}|It is of format")


@pytest.mark.parametrize("name", ["files", "tensors"])
@pytest.mark.parametrize("value", [None, [], "x", {}])
def test_entries_of_a_manifest_that_are_no_records_are_refused(checkpoint, name, value):
    forge(checkpoint, lambda record: record[name].update({next(iter(record[name])): value}))
    refused(checkpoint, "manifest.json: (The array|It has arrays.safetensors=)")


def test_a_checkpoint_of_a_later_handloom_says_so(checkpoint):
    forge(checkpoint, lambda record: record.update(format=3))
    refused(checkpoint, "It is of format 3, and this Handloom reads 1 to 2. A later version of Handloom may read it")


# ---------------------------------------------------------------------- pickle


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_disguise_is_bytes_and_nothing_else(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Trap())
    if name == MANIFEST:
        (checkpoint / name).write_bytes(data)
    else:
        forge_file(checkpoint, name, data)
    refused(checkpoint, name)
    assert not (tmp_path / "sprung").exists()


def test_arrays_of_objects_are_not_saved():
    with pytest.raises(CheckpointError, match="The array 'a' is of type object, which safetensors has not"):
        draft_of({"a": np.array([Trap()])})


def test_a_file_changed_while_it_is_read_is_found(checkpoint):
    """The bytes that are verified are the bytes that are returned."""
    stop, path = threading.Event(), checkpoint / ARRAYS
    data = path.read_bytes()

    def change():
        while not stop.is_set():
            with path.open("r+b") as file:
                file.seek(len(data) - 1)
                file.write(bytes([data[-1] ^ 1]))
                file.seek(len(data) - 1)
                file.write(data[-1:])

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


def test_the_corpus_is_made_of_a_checkpoint_that_loads(checkpoint):
    forge(checkpoint, lambda record: None)
    forge_file(checkpoint, CONTENTS, (checkpoint / CONTENTS).read_bytes())
    assert is_of(hl.load_checkpoint(checkpoint), 1)
    shutil.copytree(checkpoint, checkpoint.parent / "copy")
    assert set(hl.load_checkpoint(checkpoint.parent / "copy").arrays) == set(arrays(1))
