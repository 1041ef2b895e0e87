"""The table of the rows: generated from the results of the tests, and compared with the results of before."""

import copy
import json

import numpy as np
import pytest
from _pytest.reports import TestReport

from tests.rows import table
from tests.rows.figures import FIGURE, REFUSAL, below, blank
from tests.rows.shown import Rows, row_of

pytestmark = pytest.mark.once


def result(*figures, refusal=(), failed=()):
    return {"failed": list(failed), FIGURE: list(figures), REFUSAL: list(refusal)}


@pytest.fixture
def found():
    """All rows, each with a figure, on all backends."""
    rows = {row: result(f"figure of {row}") for row in table.ROWS if row not in table.LATER}
    return {backend: copy.deepcopy(rows) for backend in table.BACKENDS}


def line_of(row, lines):
    [line] = [line for line in lines.splitlines() if line.startswith(f"| {row} |")]
    return line


def test_table_has_a_line_for_each_row(found):
    lines = table.table(found)
    for row, task in table.ROWS.items():
        status = "to come" if row in table.LATER else "works"
        assert line_of(row, lines).startswith(f"| {row} | {task} | {status} | {status} | {status} |")


def test_table_merges_equal_figures_and_lists_the_others_by_backend(found):
    for backend, accuracy in (("tensorflow", 0.97), ("jax", 0.98), ("torch", 0.96)):
        found[backend]["A4"] = result(f"accuracy {accuracy} after 5 epochs", "digits")
    found["jax"]["A4"][FIGURE].append("1 trace")
    line = line_of("A4", table.table(found))
    assert line.endswith("| accuracy 0.97 / 0.98 / 0.96 after 5 epochs; digits; 1 trace (JAX) |")


def test_table_shows_refusals(found):
    found["torch"]["F3"] = result(refusal=["text", "sparse batches"])
    found["jax"]["F3"] = result("sparse batches", refusal=["text"])
    line = line_of("F3", table.table(found))
    assert "| works | in part | in part |" in line
    assert line.endswith("sparse batches (JAX); refused: text (JAX, PyTorch); refused: sparse batches (PyTorch) |")


def test_table_lists_rows_without_a_test_or_a_figure_failures_and_unknown_rows(found):
    del found["jax"]["B1"]
    found["torch"]["B2"] = result("1", failed=["tests/rows/test_b.py::test_b2_x"])
    found["tensorflow"] |= {"B3": result(), "Z1": result("1"), "E3": result("1")}
    with pytest.raises(SystemExit) as raised:
        table.table(found)
    assert raised.value.code.splitlines() == [
        "B1: no test ran on JAX",
        "B2: failed on PyTorch: tests/rows/test_b.py::test_b2_x",
        "B3: no figure on TensorFlow (see tests/rows/shown.py)",
        "E3: not a row of the table (see tests/rows/table.py)",
        "Z1: not a row of the table (see tests/rows/table.py)",
    ]


def test_read_names_missing_files(tmp_path):
    with pytest.raises(SystemExit, match=r"Missing: .*torch\.json\. Run `make rows`"):
        table.read(tmp_path)


AGREEING = [
    ("accuracy 0.97", "accuracy 0.95"),
    ("accuracy 0.97", "accuracy 0.97 / 0.96 / 0.98"),
    ("loss 0.008", "loss 0.009"),
    ("differ by below 1e-6", "differ by below 1e-5"),
]
DISAGREEING = [
    ("accuracy 0.97", "accuracy 0.80"),
    ("accuracy 0.97", "accuracy 0.97 / 0.96 / 0.5"),
    ("loss 0.008", "loss 0.010"),
    ("3 batches", "4 batches"),
    ("accuracy 0.97", "precision 0.97"),
    ("32 steps", "32 steps, and more"),
    ("differ by below 1e-6", "differ by below 1e-2"),
    ("[36.0, 10.0]", "[36.0, 1.0]"),
    ("[30.0, None]", "[30.0, 0.0]"),
    ("from -1.5", "from 1.5"),
    ("works | works", "works | in part"),
]


def test_differences_ignores_rounding_only():
    assert [pair for pair in AGREEING if table.differences(*pair) or table.differences(*pair[::-1])] == []
    assert [pair for pair in DISAGREEING if not table.differences(*pair) or table.agree(*pair[::-1])] == []
    assert table.differences("one", "one\ntwo") == "- \n+ two"


def test_blank_replaces_all_numbers():
    assert blank("l2 from -1.5 to 2e-05, A11, [6.0, None]") == "l2 from 0 to 0, A11, [0, None]"


@pytest.mark.parametrize("difference", [3e-7, 9.9e-7, 1e-7, 0.5, 2.0, np.float32(0.003)])
def test_below_gives_the_next_power_of_ten(difference):
    bound = float(below(difference).removeprefix("below "))
    assert difference < bound <= 10 * difference * (1 + 1e-6)
    assert below(0.0) == below(1e-13) == "below 1e-11"


def test_row_of_reads_the_row_from_the_name_of_a_test():
    assert row_of("tests/rows/test_a_best.py::test_a11_fit_stops[by hand]") == "A11"
    assert row_of("tests/rows/test_table.py::test_table_has_a_line_for_each_row") is None
    assert row_of("tests/run/test_loop.py::test_a11_fit_stops") is None


def test_rows_collects_reports_by_row_in_the_order_of_the_file(tmp_path):
    def report(name, line, outcome="passed", when="call", told=()):
        nodeid = f"tests/rows/test_a.py::{name}"
        return TestReport(nodeid, ("tests/rows/test_a.py", line, name), {}, outcome, None, when, user_properties=told)

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
        "A2": result("first 1", "later 3", refusal=["text"]),
        "A3": result(failed=["tests/rows/test_a.py::test_a3_z"]),
    }
