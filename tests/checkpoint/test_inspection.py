"""`handloom checkpoint ls|verify|show`."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from handloom.checkpoint.store import Store
from handloom.cli import main
from tests.checkpoint.common import ARRAYS, CONTENTS, contents, draft_of, flip, save

pytestmark = pytest.mark.once

DAMAGE = "is damaged: the array 'model.mask' changed. [HL517]"


def run(*words):
    return CliRunner().invoke(main, ["checkpoint", *map(str, words)])


@pytest.fixture
def directory(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, metrics={"loss": 0.5 * step, "never": float("nan")})
    return tmp_path


@pytest.fixture
def damaged(directory):
    flip(directory / "step_000000002" / ARRAYS)
    return directory / "step_000000002" / ARRAYS


def test_checkpoint_ls_prints_a_line_for_each(directory):
    (directory / "step_000000001" / CONTENTS).write_text("")
    result = run("ls", directory)
    assert result.exit_code == 0
    first, second = result.output.splitlines()
    assert first.startswith("step_000000001  DAMAGED: ")
    assert second.startswith("step_000000002  5 arrays, ")
    assert second.endswith(" bytes  loss=1")


def test_checkpoint_verify_says_that_all_are_whole(directory):
    result = run("verify", directory)
    assert result.exit_code == 0
    assert [line[:21] for line in result.output.splitlines()] == ["step_000000001  whole", "step_000000002  whole"]


def test_checkpoint_verify_names_damaged_arrays_and_ends_with_1(directory, damaged):
    for where in (directory, damaged.parent):
        result = run("verify", where)
        assert result.exit_code == 1
        assert result.output.splitlines()[-1] == f"step_000000002  DAMAGED: {damaged} {DAMAGE}"


def test_checkpoint_show_prints_arrays_and_contents(directory):
    for where in (directory, directory / "step_000000002"):
        result = run("show", where)
        assert result.exit_code == 0
        lines = result.output.splitlines()
        assert f"{directory / 'step_000000002'}: step 2, 5 arrays, " in lines[0]
        assert [line.split()[0] for line in lines[1:6]] == sorted(line.split()[0] for line in lines[1:6])
        assert "model.dense.kernel    float32   [5, 7]            140 bytes" in lines
        assert "optimizer.iterations  int64     []                8 bytes" in lines
        assert json.loads("\n".join(lines[6:])) == contents(2)


def test_checkpoint_show_gives_the_length_of_a_long_list(tmp_path):
    lists = {"few": [1, 2], "loss": [0.5] * 80, "words": ["a"] * 9}
    store = Store(tmp_path, None, None)
    store.save(draft_of(contents={"history": lists}))
    store.close()
    lines = run("show", tmp_path).output.splitlines()
    shown = {"few": [1, 2], "loss": "80 numbers", "words": "9 values"}
    assert json.loads("\n".join(lines[1:])) == {"history": shown}


def test_checkpoint_show_refuses_a_damaged_one(directory, damaged):
    result = run("show", directory)
    assert result.exit_code == 1
    assert result.output == f"Error: {damaged} {DAMAGE}\n"


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_checkpoint_commands_say_where_there_is_none(tmp_path, command):
    result = run(command, tmp_path)
    assert result.exit_code == 1
    assert result.output == f"Error: There is no checkpoint at {tmp_path}, or in it. [HL520]\n"
    assert run(command, tmp_path / "nowhere").exit_code == 2


def test_checkpoint_commands_and_load_checkpoint_import_no_backend(directory):
    code = f"""
import sys
import handloom as hl
from handloom.cli import main
main(["checkpoint", "ls", "--help"], standalone_mode=False)
assert "numpy" not in sys.modules
for command in ("ls", "verify", "show"):
    main(["checkpoint", command, {str(directory)!r}], standalone_mode=False)
hl.load_checkpoint({str(directory)!r})
assert not {{"keras", "jax", "tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
