"""`handloom checkpoint ls|verify|show`, as a user types it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from handloom.cli import main
from tests.checkpoint.common import contents, save

pytestmark = pytest.mark.once


def run(*words):
    return CliRunner().invoke(main, ["checkpoint", *map(str, words)])


@pytest.fixture
def directory(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, metrics={"loss": 0.5 * step, "never": float("nan")})
    return tmp_path


def damage(directory):
    path = directory / "step_000000002" / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    return path


def test_ls_has_a_line_for_each(directory):
    result = run("ls", directory)
    assert result.exit_code == 0
    first, second = result.output.splitlines()
    assert first.startswith("step_000000001  5 arrays, ")
    assert first.endswith(" bytes  loss=0.5")
    assert second.startswith("step_000000002  5 arrays, ")


def test_ls_takes_a_runs_directory_too(tmp_path):
    save(tmp_path / "checkpoints", 3)
    assert run("ls", tmp_path).output.startswith("step_000000003  5 arrays, ")


def test_ls_marks_what_is_evidently_damaged(directory):
    (directory / "step_000000001" / "contents.json").write_text("")
    result = run("ls", directory)
    assert result.exit_code == 0
    assert "step_000000001  DAMAGED: " in result.output.splitlines()[0]


def test_verify_says_that_all_is_whole(directory):
    result = run("verify", directory)
    assert result.exit_code == 0
    assert [line[:21] for line in result.output.splitlines()] == ["step_000000001  whole", "step_000000002  whole"]


def test_verify_names_file_and_tensor_that_are_damaged_and_ends_with_one(directory):
    path = damage(directory)
    for where in (directory, path.parent):
        result = run("verify", where)
        assert result.exit_code == 1
        assert result.output.splitlines()[-1] == (
            f"step_000000002  DAMAGED: {path} is damaged: the array 'model.mask' is not as written. [HL517]"
        )


def test_show_names_arrays_and_contents(directory):
    for where in (directory, directory / "step_000000002"):
        result = run("show", where)
        assert result.exit_code == 0
        lines = result.output.splitlines()
        assert f"{directory / 'step_000000002'}: step 2, 5 arrays, " in lines[0]
        assert [line.split()[0] for line in lines[1:6]] == sorted(line.split()[0] for line in lines[1:6])
        assert "model.dense.kernel    float32   [5, 7]            140 bytes" in lines
        assert "optimizer.iterations  int64     []                8 bytes" in lines
        assert json.loads("\n".join(lines[6:])) == contents(2)


def test_show_refuses_a_damaged_one_in_a_sentence(directory):
    path = damage(directory)
    result = run("show", directory)
    assert result.exit_code == 1
    assert result.output == f"Error: {path} is damaged: the array 'model.mask' is not as written. [HL517]\n"


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_where_there_is_none_that_is_said(tmp_path, command):
    result = run(command, tmp_path)
    assert result.exit_code == 1
    assert result.output == f"Error: There is no checkpoint at {tmp_path}, nor are there any in it. [HL520]\n"
    assert run(command, tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize("words", [["--help"], ["ls", "--help"], ["ls"], ["verify"], ["show"]])
def test_no_backend_is_imported(directory, words):
    words = ["checkpoint", *words, *([] if "--help" in words else [str(directory)])]
    late = {"keras", "jax", "tensorflow", "torch"} | ({"numpy"} if "--help" in words else set())
    code = (
        "import sys\nfrom handloom.cli import main\n"
        f"main({words}, standalone_mode=False)\nprint('imported:', *{late} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1].strip() == "imported:"
