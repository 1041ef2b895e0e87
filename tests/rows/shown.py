"""What the tests of the rows found out, a file for each backend: a plugin of pytest. `table.py` makes a table of it.

KERAS_BACKEND=jax python -m pytest tests/rows --rows build/rows/jax.json
"""

import json
import re
from pathlib import Path

import keras
import pytest

from tests.rows.figures import FIGURE, REFUSAL, blank


def row_of(nodeid):
    """The row that a test shows: `A11` of `tests/rows/test_a_best.py::test_a11_it_stops`; `None` if it shows none."""
    found = re.search(r"^tests/rows/.*::test_([a-f]\d+)_", nodeid)
    return found and found[1].upper()


@pytest.fixture
def shown(request):
    """Tells a figure that shows the row, as a text: `shown(f"test accuracy {accuracy:.2f}")`."""
    return lambda text: request.node.user_properties.append((FIGURE, text))


@pytest.fixture
def refused(request):
    """Tells what this backend cannot do, when the test has seen the error that says what to do instead."""
    return lambda what: request.node.user_properties.append((REFUSAL, what))


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="FILE", help="write what the tests of the rows found out, as JSON")


def pytest_configure(config):
    works_for_another = hasattr(config, "workerinput")  # To which all reports go.
    if config.getoption("--rows") and not works_for_another:
        config.pluginmanager.register(Rows(Path(config.getoption("--rows"))))


class Rows:
    """Gathers the reports of the tests of the rows."""

    def __init__(self, path):
        self.path, self.reports = path, []

    def pytest_runtest_logreport(self, report):
        if row_of(report.nodeid) and (report.failed or (report.when == "call" and report.passed)):
            self.reports.append(report)

    def pytest_sessionfinish(self):
        rows = {}
        for report in sorted(self.reports, key=lambda report: (report.location[:2], report.nodeid)):
            row = rows.setdefault(row_of(report.nodeid), {"failed": [], FIGURE: [], REFUSAL: []})
            row["failed"] += [report.nodeid] if report.failed else []
            for kind, text in report.user_properties:
                # Of a test with parameters, the first to tell it: the others give the same but for rounding.
                row[kind] += [text] if blank(text) not in map(blank, row[kind]) else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"backend": keras.backend.backend(), "rows": rows}
        self.path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
