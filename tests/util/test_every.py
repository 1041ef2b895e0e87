"""`hl.every`: schedules as values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import handloom as hl
from handloom._util.progress import Progress

pytestmark = pytest.mark.once


def times(when, epochs, batches):
    """The (epoch, step) at which a schedule is due in a run."""
    progress, due = Progress(), []

    def ask():
        if when.due(progress):
            due.append((progress.epoch, progress.step))

    for _ in range(epochs):
        for _ in range(batches):
            progress.advance()
            ask()
        progress.end_epoch()
        ask()
    return due


def test_every_is_not_due_before_the_first_step():
    assert not any(when.due(Progress()) for when in (hl.every(epochs=1), hl.every(steps=1)))


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 6))
def test_every_steps_is_due_at_each_multiple_in_the_whole_run(every, epochs, batches):
    due = times(hl.every(steps=every), epochs, batches)
    assert due == [((step - 1) // batches, step) for step in range(every, epochs * batches + 1, every)]


@given(st.integers(1, 5), st.integers(0, 8), st.integers(1, 3))
def test_every_epochs_is_due_at_the_end_of_each_multiple(every, epochs, batches):
    due = times(hl.every(epochs=every), epochs, batches)
    assert due == [(epoch, epoch * batches) for epoch in range(every, epochs + 1, every)]


def test_every_seconds_is_due_after_a_step_once_that_time_has_passed():
    when, within_epoch, at_end = hl.every(seconds=0.5), Progress(step=3, batch=3), Progress(epoch=1, step=3)
    assert [when.due(within_epoch, seconds) for seconds in (0, 0.49, 0.5, 25)] == [False, False, True, True]
    assert not when.due(at_end, 100)


def test_every_is_a_value():
    assert hl.every(steps=5) == hl.every(steps=5)
    assert hl.every(steps=5) != hl.every(epochs=5)
    assert len({hl.every(steps=5), hl.every(steps=5), hl.every(seconds=5)}) == 2
    assert repr(hl.every(steps=5)) == "Every(steps=5, epochs=None, seconds=None)"
    assert isinstance(hl.every(epochs=1), hl.Every)
    with pytest.raises(AttributeError):
        hl.every(steps=5).steps = 6


@pytest.mark.parametrize("given", [{}, {"steps": 1, "epochs": 1}, {"steps": 1, "epochs": 1, "seconds": 1}])
def test_every_takes_exactly_one_unit(given):
    with pytest.raises(ValueError, match=r"exactly one of steps=, epochs= and seconds=.*hl.every\(epochs=1.*HL010"):
        hl.every(**given)


@pytest.mark.parametrize("unit", ["steps", "epochs"])
@pytest.mark.parametrize("number", [0, -1, 1.5, "3", True])
def test_every_takes_positive_whole_numbers_of_steps_and_epochs(unit, number):
    with pytest.raises(ValueError, match=rf"hl.every\({unit}=...\) takes a whole number, at least 1; received "):
        hl.every(**{unit: number})


@pytest.mark.parametrize("number", [0, -0.5, "3", True])
def test_every_takes_a_positive_number_of_seconds(number):
    with pytest.raises(ValueError, match=r"hl.every\(seconds=...\) takes a positive number; received "):
        hl.every(seconds=number)
