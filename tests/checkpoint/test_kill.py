"""A process that is killed at any instant of a save leaves an intact checkpoint."""

import ast
from pathlib import Path

import pytest

from handloom.checkpoint.store import read_newest
from tests.checkpoint.common import Copies, install, is_of, save

pytestmark = pytest.mark.once

PACKAGE = Path(__file__).parents[2] / "handloom" / "checkpoint"


def left_by_kills(directory, step, keep):
    """Copies of a directory as a process leaves it that is killed at any call of a save."""
    copies = Copies(directory, directory.with_name(f"killed {directory.name}"))
    install(copies)
    save(directory, step, keep=keep)
    install(None)
    return copies.different()


@pytest.mark.parametrize(
    ("before", "new", "keep", "twice"),
    [
        pytest.param(1, 2, 1, False, id="the only one kept is replaced"),
        pytest.param(1, 2, 3, False, id="both are kept"),
        pytest.param(None, 1, 1, False, id="the first of all"),
        pytest.param(1, 1, 1, False, id="the same step again"),
        pytest.param(1, 2, 1, True, id="after another process that was killed"),
    ],
)
def test_save_that_is_killed_at_any_system_call_leaves_an_intact_checkpoint(before, new, keep, twice, tmp_path):
    directory = tmp_path / "run"
    if before is not None:
        save(directory, before)
    copies = left_by_kills(directory, new, keep)
    if twice:
        copies = [again for copy in copies[1::4] for again in left_by_kills(copy, new, keep)]
    committed = set()
    for copy in copies:
        found, damaged = read_newest(copy)
        assert not damaged
        assert (None if found is None else found.step) in (before, new)
        assert found is None or is_of(found, found.step)
        committed.add(found is not None and (found.step, found.path.name) != (before, "step_000000001"))
        save(copy, 9, keep=keep)
        names = {path.name for path in copy.iterdir()}
        assert names <= {".lock", "step_000000001", "step_000000001_1", "step_000000002", "step_000000009"}
        assert keep != 1 or names == {".lock", "step_000000009"}
        assert is_of(read_newest(copy)[0], 9)
    assert len(copies) > 15
    assert committed == {True, False}  # Some are of before the commit, and some of after it.


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGE.glob("*.py")))
def test_only_filesystem_and_lock_make_system_calls(name):
    if name in ("filesystem.py", "lock.py"):
        return
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"os", "shutil", "tempfile", "io"}
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "open"
            called = ast.unparse(node.func).split(".")[-1]
            assert called not in ("write_text", "write_bytes", "touch", "mkdir", "tofile")
