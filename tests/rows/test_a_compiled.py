"""Row A15: a step op by op, and compiled, by the benchmark that has the table of both."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest

import handloom as hl

SOURCE = Path(__file__).parents[2] / "benchmarks" / "compiled.py"
STEPS = 10


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("compiled", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["dense", "deep", "conv"])
def test_a15_the_numbers_are_the_same_and_python_runs_only_to_compile(benchmark, kind, shown):
    runs = {True: [], False: []}
    losses = {}
    for eagerly in (True, False):
        train = benchmark.training(kind, lambda eagerly=eagerly: runs[eagerly].append(1))
        with hl.run_eagerly(eagerly):
            losses[eagerly] = train(STEPS)
            to_compile = len(runs[eagerly])
            losses[eagerly] += train(STEPS)
            runs[eagerly] = len(runs[eagerly]) - to_compile
    assert losses[True][-1] < losses[True][0]
    np.testing.assert_allclose(losses[False], losses[True], rtol=1e-4)
    assert runs == {True: STEPS, False: 0}
    shown(
        f"{STEPS} steps: Python runs the step {STEPS} times op by op, 0 times compiled, with equal losses (rtol 1e-4)"
    )
    shown("times and ratio: `make bench`")


def test_a15_the_table_has_both_and_the_ratio(benchmark):
    head, *rows = benchmark.table(rounds=1, steps=2).strip().splitlines()
    assert head.split()[0] == keras.backend.backend()
    assert [row.split()[0] for row in rows] == list(benchmark.SHAPES)
    for row in rows:
        op_by_op, compiled, ratio = map(float, row.split()[1:])
        assert op_by_op > 0
        assert compiled > 0
        assert ratio == pytest.approx(op_by_op / compiled, rel=0.5, abs=0.1)
