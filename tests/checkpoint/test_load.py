"""`hl.load_checkpoint`: a checkpoint as names and arrays, without a model."""

import pytest

import handloom as hl
from handloom.errors import CheckpointError
from tests.checkpoint.common import is_of, save

pytestmark = pytest.mark.once


def test_load_checkpoint_reads_one_or_the_newest_of_many(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, metrics={"loss": float(step)})
    assert is_of(hl.load_checkpoint(tmp_path), 2)
    found = hl.load_checkpoint(str(tmp_path / "step_000000001"))
    assert is_of(found, 1)
    assert found.metrics == {"loss": 1.0}
    assert found.path == tmp_path / "step_000000001"


def test_load_checkpoint_takes_a_run_directory_and_the_working_directory(tmp_path, monkeypatch):
    save(tmp_path / "checkpoints", 1)
    assert is_of(hl.load_checkpoint(tmp_path), 1)
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert is_of(hl.load_checkpoint("."), 1)
    monkeypatch.chdir("step_000000001")
    assert is_of(hl.load_checkpoint("."), 1)


@pytest.mark.parametrize("name", [".", "nowhere", "file"])
def test_load_checkpoint_says_where_there_is_none(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*, or in it\. \[HL520\]"):
        hl.load_checkpoint(tmp_path / name)
