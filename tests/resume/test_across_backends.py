"""A run that began on one backend resumes on another, at the same position and with the same numbers."""

import itertools
import json
import subprocess

import numpy as np
import pytest

import handloom as hl
from handloom._util.backend_names import BACKENDS
from tests.numbers import close
from tests.on_backends import started

pytestmark = pytest.mark.once  # It starts three processes.

PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


def begun(directory, backend):
    own, *others = sorted(BACKENDS, key=lambda other: other != backend)
    (directory / own).mkdir()
    return started(backend, "tests.resume.across", *(directory / each for each in (own, *others)), **PIPES)


def run_all(directory):
    """Makes a directory for each backend, with the run that it began, and those that it resumed."""
    processes = {backend: begun(directory, backend) for backend in BACKENDS}
    for process in processes.values():
        process.stdout.readline()
    for process in processes.values():
        process.stdin.write("All have begun.\n")
        process.stdin.flush()
    for backend, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, f"on {backend}:\n{errors}"


class Run:
    """The notes of a run on one backend that another, or the same, began."""

    def __init__(self, directory, backend, began):
        path = directory / backend / f"from {began}"
        self.__dict__ |= json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.first, self.last = (dict(np.load(f"{path} {when}.npz")) for when in ("first", "last"))


# It takes some seconds: three processes each import a backend, and compile the step four times.
def test_fit_resumes_on_another_backend(tmp_path):
    run_all(tmp_path)
    for began, resumed in itertools.permutations(BACKENDS, 2):
        way, saved = f"from {began} to {resumed}", hl.load_checkpoint(tmp_path / began / "stopped" / "checkpoints")
        stayed, run = Run(tmp_path, began, began), Run(tmp_path, resumed, began)
        assert saved.step == 6
        assert run.begun == stayed.begun == [1, 1], way
        arrays = {name: array for name, array in saved.arrays.items() if name[0] != "@"}
        assert run.first.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(run.first[name], array, err_msg=f"{way}: {name}")

        (losses, firsts), (expected_losses, expected_firsts) = (zip(*each.steps, strict=True) for each in (run, stayed))
        assert firsts == expected_firsts, way  # The same batches.
        assert len(set(firsts)) > 5
        close(losses, expected_losses, rtol=1e-4)
        for name, values in stayed.history.items():
            close(run.history[name], values, rtol=1e-4)
        for name, array in stayed.last.items():
            close(run.last[name], array, rtol=1e-4)
