"""When, as a value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import handloom as hl
from handloom._util.progress import Progress

pytestmark = pytest.mark.once


def times(when, epochs, batches):
    """The (epoch, step) at which it is due, in a run of so many epochs of so many batches."""
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


def test_every_step_is_due_once_after_each_step():
    assert times(hl.every(steps=1), 2, 2) == [(0, 1), (0, 2), (1, 3), (1, 4)]


def test_steps_are_counted_over_the_whole_run():
    assert times(hl.every(steps=3), 2, 4) == [(0, 3), (1, 6)]


def test_a_multiple_of_steps_at_the_end_of_an_epoch_is_due_once():
    assert times(hl.every(steps=2), 2, 2) == [(0, 2), (1, 4)]


def test_epochs_are_due_at_their_end():
    assert times(hl.every(epochs=1), 3, 2) == [(1, 2), (2, 4), (3, 6)]
    assert times(hl.every(epochs=2), 5, 2) == [(2, 4), (4, 8)]


def test_nothing_is_due_before_the_first_step():
    assert not any(when.due(Progress()) for when in (hl.every(epochs=1), hl.every(steps=1)))


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 6))
def test_steps_are_due_as_often_as_they_fit(every, epochs, batches):
    due = times(hl.every(steps=every), epochs, batches)
    assert [step for _, step in due] == list(range(every, epochs * batches + 1, every))


@given(st.integers(1, 5), st.integers(0, 8), st.integers(1, 3))
def test_epochs_are_due_as_often_as_they_fit(every, epochs, batches):
    due = times(hl.every(epochs=every), epochs, batches)
    assert [epoch for epoch, _ in due] == list(range(every, epochs + 1, every))


def test_seconds_are_due_once_so_many_have_passed():
    when, within_epoch = hl.every(seconds=10), Progress(step=3, batch=3)
    assert [when.due(within_epoch, seconds) for seconds in (0, 9.9, 10, 25)] == [False, False, True, True]


def test_seconds_wait_for_a_step():
    assert not hl.every(seconds=0.5).due(Progress(epoch=1, step=3), 100)


def test_it_is_a_value():
    assert hl.every(steps=5) == hl.every(steps=5)
    assert hl.every(steps=5) != hl.every(epochs=5)
    assert len({hl.every(steps=5), hl.every(steps=5), hl.every(seconds=5)}) == 2
    assert repr(hl.every(steps=5)) == "Every(steps=5, epochs=None, seconds=None)"
    assert isinstance(hl.every(epochs=1), hl.Every)
    with pytest.raises(AttributeError):
        hl.every(steps=5).steps = 6


@pytest.mark.parametrize("given", [{}, {"steps": 1, "epochs": 1}, {"steps": 1, "epochs": 1, "seconds": 1}])
def test_exactly_one_unit_is_given(given):
    with pytest.raises(
        ValueError, match=r"exactly one of steps=, epochs= and seconds=.*For example: hl.every\(epochs=1"
    ):
        hl.every(**given)


@pytest.mark.parametrize("unit", ["steps", "epochs"])
@pytest.mark.parametrize("number", [0, -1, 1.5, "3", True])
def test_steps_and_epochs_are_positive_whole_numbers(unit, number):
    with pytest.raises(ValueError, match=rf"hl.every\({unit}=...\) takes a whole number, at least 1; received "):
        hl.every(**{unit: number})


@pytest.mark.parametrize("number", [0, -0.5, "3", True])
def test_seconds_are_a_positive_number(number):
    with pytest.raises(ValueError, match=r"hl.every\(seconds=...\) takes a positive number; received "):
        hl.every(seconds=number)


def test_seconds_may_be_a_fraction():
    assert hl.every(seconds=0.25).seconds == 0.25
