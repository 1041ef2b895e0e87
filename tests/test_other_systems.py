"""Windows and macOS: nothing fails at import or in saving, on a system that lacks and refuses what they do."""

import os
import subprocess
import sys

import pytest

from tests.on_backends import ROOT

pytestmark = pytest.mark.once

EVERYWHERE = """\
imported: True
excluded: True
restored: 2 [2.0, 3.0, 4.0]
left: ['.lock', 'step_000000002']
fitted: 8 True run_end
"""


# Over 10 s: each starts a process that imports the libraries and trains.
@pytest.mark.parametrize(("system", "printed"), [("windows", EVERYWHERE), ("macos", EVERYWHERE + "flushed: True\n")])
def test_fit_and_checkpointer_save_resume_and_exclude_other_writers(system, printed, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.other_systems", system, str(tmp_path)]
    # The characters that a terminal of Windows can show.
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout == printed, done.stderr[-3000:]
