"""The page of departures from Keras is that of the table, and the tests named in it exist."""

import pytest

from docs.departures import PAGE, ROOT, departures, page

ROWS = departures()


@pytest.mark.once
def test_departures_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(ROWS), "make departures"


@pytest.mark.once
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours[:40])
def test_departures_are_each_held_by_tests_that_exist(row):
    assert row.tests
    for file, _, name in (test.partition("::") for test in row.tests):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
