"""The table of the rows: made of what tests tell, and compared with what was told before."""

import copy
import json

import numpy as np
import pytest
from _pytest.reports import TestReport

from tests.rows import table
from tests.rows.figures import FIGURE, REFUSAL, below, blank
from tests.rows.shown import Rows, row_of

pytestmark = pytest.mark.once


def of_row(*figures, refusal=(), failed=()):
    return {"failed": list(failed), FIGURE: list(figures), REFUSAL: list(refusal)}


@pytest.fixture
def found():
    """All rows, each with a figure, on all backends."""
    rows = {row: of_row(f"figure of {row}") for row in table.ROWS if row not in table.LATER}
    return {backend: copy.deepcopy(rows) for backend in table.BACKENDS}


def line_of(row, made):
    [line] = [line for line in made.splitlines() if line.startswith(f"| {row} |")]
    return line


def test_each_row_has_its_line(found):
    made = table.table(found)
    for row, what in table.ROWS.items():
        status = "to come" if row in table.LATER else "works"
        assert line_of(row, made).startswith(f"| {row} | {what} | {status} | {status} | {status} |")


def test_figures_stand_once_where_they_are_the_same_and_by_backend_where_not(found):
    for backend, accuracy in (("tensorflow", 0.97), ("jax", 0.98), ("torch", 0.96)):
        found[backend]["A4"] = of_row(f"accuracy {accuracy} after 5 epochs", "digits")
    found["jax"]["A4"][FIGURE].append("1 trace")
    assert line_of("A4", table.table(found)).endswith(
        "| accuracy 0.97 / 0.98 / 0.96 after 5 epochs; digits; 1 trace (JAX) |"
    )


def test_what_is_refused_is_told(found):
    found["torch"]["F3"] = of_row(refusal=["text", "sparse batches"])
    found["jax"]["F3"] = of_row("sparse batches", refusal=["text"])
    line = line_of("F3", table.table(found))
    assert "| works | in part | in part |" in line
    assert line.endswith("sparse batches (JAX); refused: text (JAX, PyTorch); refused: sparse batches (PyTorch) |")


def problem(found):
    with pytest.raises(SystemExit) as raised:
        table.table(found)
    return raised.value.code


def test_there_is_no_table_of_what_did_not_run_failed_or_was_not_shown(found):
    del found["jax"]["B1"]
    found["torch"]["B2"] = of_row("1", failed=["tests/rows/test_b.py::test_b2_x"])
    found["tensorflow"]["B3"] = of_row()
    found["tensorflow"]["Z1"] = of_row("1")
    found["tensorflow"]["E3"] = of_row("1")
    assert problem(found).splitlines() == [
        "B1: no test of it ran on JAX",
        "B2: failed on PyTorch: tests/rows/test_b.py::test_b2_x",
        "B3: no figure on TensorFlow (see tests/rows/shown.py)",
        "E3: no row to be shown (see tests/rows/table.py)",
        "Z1: no row to be shown (see tests/rows/table.py)",
    ]


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ("accuracy 0.97", "accuracy 0.95", True),
        ("accuracy 0.97", "accuracy 0.80", False),
        ("accuracy 0.97", "accuracy 0.97 / 0.96 / 0.98", True),
        ("accuracy 0.97", "accuracy 0.97 / 0.96 / 0.5", False),
        ("loss 0.008", "loss 0.009", True),
        ("loss 0.008", "loss 0.010", False),
        ("3 batches", "4 batches", False),
        ("accuracy 0.97", "precision 0.97", False),
        ("32 steps", "32 steps, and more", False),
        ("apart by below 1e-6", "apart by below 1e-5", True),
        ("apart by below 1e-6", "apart by below 1e-2", False),
        ("[36.0, 10.0]", "[36.0, 1.0]", False),
        ("[30.0, None]", "[30.0, 0.0]", False),
        ("from -1.5", "from 1.5", False),
        ("works | works", "works | in part", False),
    ],
)
def test_two_lines_agree_but_for_rounding(one, other, agree):
    assert table.agree(one, other) == table.agree(other, one) == agree
    assert bool(table.differences(f"same\n{one}", f"same\n{other}")) != agree


def test_a_line_more_is_a_difference():
    assert table.differences("one", "one\ntwo") == "- \n+ two"


def test_numbers_are_not_part_of_what_a_text_tells():
    assert blank("l2 from -1.5 to 2e-05, A11, [6.0, None]") == "l2 from 0 to 0, A11, [0, None]"


@pytest.mark.parametrize("difference", [3e-7, 9.9e-7, 1e-7, 0.5, 2.0, np.float32(0.003)])
def test_a_difference_is_below_the_next_power_of_ten(difference):
    bound = float(below(difference).removeprefix("below "))
    assert difference < bound <= 10 * difference * (1 + 1e-6)
    assert below(0.0) == below(1e-13) == "below 1e-11"


def test_a_test_is_of_the_row_in_its_name():
    assert row_of("tests/rows/test_a_best.py::test_a11_it_stops[by hand]") == "A11"
    assert row_of("tests/rows/test_table.py::test_each_row_has_its_line") is None
    assert row_of("tests/run/test_loop.py::test_a11_it_stops") is None


def report(name, line, outcome="passed", when="call", told=()):
    nodeid = f"tests/rows/test_a.py::{name}"
    return TestReport(nodeid, ("tests/rows/test_a.py", line, name), {}, outcome, None, when, user_properties=told)


def test_what_tests_tell_is_gathered_by_row_in_the_order_of_the_file(tmp_path):
    rows = Rows(tmp_path / "build" / "jax.json")
    for each in (
        report("test_a2_y", 30, told=[(FIGURE, "later 3")]),
        report("test_a2_x[1]", 20, told=[(FIGURE, "first 1"), (REFUSAL, "text")]),
        report("test_a2_x[2]", 20, told=[(FIGURE, "first 2")]),
        report("test_a3_z", 40, "failed", "setup"),
        report("test_a4_z", 50, "skipped", "setup"),
        report("test_a4_z", 50, "passed", "teardown"),
    ):
        rows.pytest_runtest_logreport(each)
    rows.pytest_sessionfinish()
    assert json.loads((tmp_path / "build" / "jax.json").read_text(encoding="utf-8"))["rows"] == {
        "A2": {"failed": [], FIGURE: ["first 1", "later 3"], REFUSAL: ["text"]},
        "A3": {"failed": ["tests/rows/test_a.py::test_a3_z"], FIGURE: [], REFUSAL: []},
    }


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"torch\.json: not there\. `make rows`"):
        table.read(tmp_path)
