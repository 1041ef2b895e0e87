"""A plugin of pytest that writes the results of the row tests, one file for each backend, for `table.py`.

KERAS_BACKEND=jax python -m pytest tests/rows --rows build/rows/jax.json
"""

import json
import re
from pathlib import Path

import keras
import pytest

from tests.rows.figures import FIGURE, REFUSAL, blank


def row_of(nodeid):
    """The row of a test: `A11` for `tests/rows/test_a_best.py::test_a11_fit_stops`; `None` for other tests."""
    found = re.search(r"^tests/rows/.*::test_([a-f]\d+)_", nodeid)
    return found and found[1].upper()


@pytest.fixture
def shown(request):
    """Records a figure for the row, as a text: `shown(f"test accuracy {accuracy:.2f}")`."""
    return lambda text: request.node.user_properties.append((FIGURE, text))


@pytest.fixture
def refused(request):
    """Records what this backend refuses, after the test has seen the error that says what to do instead."""
    return lambda text: request.node.user_properties.append((REFUSAL, text))


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="FILE", help="write the results of the row tests as JSON")


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")  # Its reports go to the controller.
    if config.getoption("--rows") and not is_worker:
        config.pluginmanager.register(Rows(Path(config.getoption("--rows"))))


class Rows:
    """Collects the reports of the row tests."""

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
                # The first text of a parametrized test counts: the others differ only by rounding.
                row[kind] += [text] if blank(text) not in map(blank, row[kind]) else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"backend": keras.backend.backend(), "rows": rows}
        self.path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
