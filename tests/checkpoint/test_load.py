"""`hl.load_checkpoint`: a checkpoint as names and arrays, without a model."""

import subprocess
import sys

import pytest

import handloom as hl
from handloom.errors import CheckpointError, HandloomWarning
from tests.checkpoint.common import is_of, save

pytestmark = pytest.mark.once


def test_one_is_read_or_the_newest_of_many(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, metrics={"loss": float(step)})
    assert is_of(hl.load_checkpoint(tmp_path), 2)
    found = hl.load_checkpoint(str(tmp_path / "step_000000001"))
    assert is_of(found, 1)
    assert found.metrics == {"loss": 1.0}
    assert found.path == tmp_path / "step_000000001"


def test_a_runs_directory_has_them_in_one_of_its_own(tmp_path):
    save(tmp_path / "checkpoints", 1)
    assert is_of(hl.load_checkpoint(tmp_path), 1)


def test_one_may_be_read_from_where_one_stands(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    assert is_of(hl.load_checkpoint("."), 1)
    monkeypatch.chdir("step_000000001")
    assert is_of(hl.load_checkpoint("."), 1)


@pytest.mark.parametrize("name", [".", "nowhere", "file"])
def test_where_there_is_none_that_is_said(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*, nor are there any in it"):
        hl.load_checkpoint(tmp_path / name)


def test_a_damaged_newest_one_is_passed_over_with_a_warning_at_the_users_line(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_000000002" / "manifest.json").write_text("{}")
    with pytest.warns(
        HandloomWarning, match="step_000000002 is passed over for step_000000001: .*manifest.json"
    ) as seen:
        assert is_of(hl.load_checkpoint(tmp_path), 1)
    assert seen[0].filename == __file__


def test_it_imports_no_backend(tmp_path):
    save(tmp_path, 1)
    code = (
        f"import sys, handloom as hl; hl.load_checkpoint({str(tmp_path)!r});"
        "print('imported:', *{'keras', 'jax', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "imported:"
