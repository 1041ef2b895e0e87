"""Row A15: an eager step and a compiled one, by the benchmark that prints the table of both."""

import importlib.util
from pathlib import Path

import keras
import pytest

import handloom as hl
from tests.numbers import close

SOURCE = Path(__file__).parents[2] / "benchmarks" / "compiled.py"
STEPS = 10


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("compiled", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["dense", "deep", "conv"])
def test_a15_run_eagerly_gives_the_numbers_of_a_compiled_step_where_python_runs_only_to_compile(benchmark, kind, shown):
    calls, losses = {True: [], False: []}, {}
    for eagerly in (True, False):
        train = benchmark.training(kind, lambda eagerly=eagerly: calls[eagerly].append(1))
        with hl.run_eagerly(eagerly):
            losses[eagerly] = train(STEPS)
            calls[eagerly].clear()
            losses[eagerly] += train(STEPS)
    assert losses[True][-1] < losses[True][0]
    close(losses[False], losses[True], rtol=1e-4, atol=0)
    assert {eagerly: len(made) for eagerly, made in calls.items()} == {True: STEPS, False: 0}
    shown(f"Python runs the eager step {STEPS} times in {STEPS} steps, the compiled one 0 times; losses equal (1e-4)")
    shown("times and ratio: `make bench`")


def test_a15_benchmark_prints_both_times_and_their_ratio(benchmark):
    head, *rows = benchmark.table(rounds=1, steps=2).strip().splitlines()
    assert head.split()[0] == keras.backend.backend()
    assert [row.split()[0] for row in rows] == list(benchmark.SHAPES)
    for row in rows:
        eager, compiled, ratio = map(float, row.split()[1:])
        assert min(eager, compiled) > 0
        assert ratio == pytest.approx(eager / compiled, rel=0.5, abs=0.1)
