"""A process that is killed at any instant of a save leaves the last checkpoint intact."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "handloom" / "checkpoint"


@pytest.mark.parametrize(
    ("before", "new", "keep", "part", "twice"),
    [
        pytest.param(1, 2, 1, 0.0, False, id="the only one kept is replaced"),
        pytest.param(1, 2, 3, 0.5, False, id="in the middle of each write"),
        pytest.param(None, 1, 1, 0.0, False, id="the first of all"),
        pytest.param(1, 1, 1, 0.0, False, id="the same step again"),
        pytest.param(1, 2, 1, 0.5, True, id="after a process that was killed too"),
    ],
)
def test_save_that_is_killed_at_any_system_call_leaves_an_intact_checkpoint(before, new, keep, part, twice):
    """Takes about ten seconds: it forks a process for each call of a save."""
    words = [str(word) for word in (before, new, keep, part, twice)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.kill", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    calls, committed = map(int, done.stdout.split())
    assert calls > 20
    assert 0 < committed < calls  # Some were killed before the commit, and some after it.


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
