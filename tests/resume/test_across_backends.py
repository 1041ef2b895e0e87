"""A run that one backend began goes on on another, from the same place and with the same numbers."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import handloom as hl

pytestmark = pytest.mark.once  # It starts three processes.

ROOT = Path(__file__).parents[2]
BACKENDS = ("jax", "tensorflow", "torch")


def started(directory, backend):
    own, *others = sorted(BACKENDS, key=lambda other: other != backend)
    (directory / own).mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "tests.resume.across", *[directory / each for each in (own, *others)]],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"},  # They share the cores.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone_on_with(directory):
    """For each backend a directory, with what it began, and what it went on with of its own and of the others'."""
    processes = {backend: started(directory, backend) for backend in BACKENDS}
    for process in processes.values():
        process.stdout.readline()
    for process in processes.values():
        process.stdin.write("All have begun.\n")
        process.stdin.flush()
    for backend, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, f"on {backend}:\n{errors}"


class Run:
    """What was noted of a run on one backend that another, or the same, began."""

    def __init__(self, directory, backend, began):
        path = directory / backend / f"from {began}"
        self.__dict__ |= json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.first, self.last = (dict(np.load(f"{path} {when}.npz")) for when in ("first", "last"))


def assert_same_place_and_bits(run, stayed, saved, way):
    assert saved.step == 6
    assert run.begun == stayed.begun == [1, 1], way
    arrays = {name: array for name, array in saved.arrays.items() if name[0] != "@"}
    assert run.first.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(run.first[name], array, err_msg=f"{way}: {name}")


def assert_same_data(run, stayed, way):
    firsts, expected = ([first for _, first in which.steps] for which in (run, stayed))
    assert firsts == expected, way
    assert len(set(firsts)) > 5


def assert_same_numbers_within_rounding(run, stayed, way):
    losses, expected = ([loss for loss, _ in which.steps] for which in (run, stayed))
    np.testing.assert_allclose(losses, expected, rtol=1e-4, err_msg=way)
    for name, values in stayed.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=1e-4, err_msg=f"{way}: {name}")
    for name, array in stayed.last.items():
        np.testing.assert_allclose(run.last[name], array, rtol=1e-4, atol=1e-6, err_msg=f"{way}: {name}")


# It takes some seconds: three processes each import a backend, and compile the step four times.
def test_a_run_goes_on_on_another_backend(tmp_path):
    gone_on_with(tmp_path)
    for began, went_on in itertools.permutations(BACKENDS, 2):
        way, saved = f"from {began} to {went_on}", hl.load_checkpoint(tmp_path / began / "stopped" / "checkpoints")
        stayed, run = Run(tmp_path, began, began), Run(tmp_path, went_on, began)
        assert_same_place_and_bits(run, stayed, saved, way)
        assert_same_data(run, stayed, way)
        assert_same_numbers_within_rounding(run, stayed, way)
