"""The counts of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handloom._util.progress import Progress

pytestmark = pytest.mark.once


@given(st.lists(st.integers(0, 5), max_size=6))
def test_progress_counts_steps_and_epochs(lengths):
    progress = Progress()
    for length in lengths:
        for index in range(length):
            assert progress.batch == index
            progress.advance()
        progress.end_epoch()
    assert progress == Progress(epoch=len(lengths), step=sum(lengths), batch=0)
