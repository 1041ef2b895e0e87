"""A pytest plugin that writes the outcome of each test as it ends, a JSON line each, into the file OUTCOMES."""

import json
import os
import sys
import types
from collections.abc import Iterator

import pytest

FAILED_PHASES = ("setup", "teardown")


def pytest_configure() -> None:
    """Gives the tests what they import of Keras's `conftest`, which is not installed."""
    conftest, backend = types.ModuleType("conftest"), os.environ["KERAS_BACKEND"]
    conftest.skip_if_backend = lambda name, reason: pytest.mark.skipif(name == backend, reason=reason)
    sys.modules["conftest"] = conftest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Writes whether the test passed, failed or was skipped; of a failure, the last line.

    One that is expected to fail counts as skipped: it may pass by chance.
    """
    report = yield
    if report.when == "call" or (report.when in FAILED_PHASES and not report.passed):
        why = str(report.longrepr).strip().splitlines()[-1] if report.failed else ""
        outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
        with open(os.environ["OUTCOMES"], "a", encoding="utf-8") as file:
            file.write(json.dumps([str(item.path), item.nodeid.partition("::")[2], outcome, why]) + "\n")
    return report
