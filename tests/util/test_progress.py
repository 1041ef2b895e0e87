"""The one counter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handloom._util.progress import Progress

pytestmark = pytest.mark.once


def test_a_run_begins_at_zero():
    assert Progress() == Progress(epoch=0, step=0, batch=0)


def test_a_step_counts_in_the_run_and_in_its_epoch():
    progress = Progress()
    progress.advance()
    progress.advance()
    assert progress == Progress(epoch=0, step=2, batch=2)


def test_an_epoch_that_ends_leaves_the_steps_of_the_run():
    progress = Progress(epoch=1, step=7, batch=3)
    progress.end_epoch()
    assert progress == Progress(epoch=2, step=7, batch=0)


@given(st.lists(st.integers(0, 5), max_size=6))
def test_what_counts_is_steps_and_epochs(lengths):
    progress = Progress()
    for length in lengths:
        for index in range(length):
            assert progress.batch == index
            progress.advance()
        progress.end_epoch()
    assert progress == Progress(epoch=len(lengths), step=sum(lengths), batch=0)
