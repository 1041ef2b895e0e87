"""How much a step's batch counts, and who is asked."""

import threading

import pytest

from handloom._trace.loss_weight import step_weight, weight_of_step


def test_where_nobody_said_a_gradient_counts_one():
    assert weight_of_step() == 1


def test_within_it_counts_what_was_said_and_after_as_before():
    with step_weight(32):
        with step_weight(7.5):
            assert weight_of_step() == 7.5
        assert weight_of_step() == 32
    assert weight_of_step() == 1


def test_it_counts_as_before_after_an_error():
    with pytest.raises(KeyError), step_weight(32):
        raise KeyError
    assert weight_of_step() == 1


def test_another_thread_has_its_own():
    found = []
    with step_weight(32):
        thread = threading.Thread(target=lambda: found.append(weight_of_step()))
        thread.start()
        thread.join()
    assert found == [1]
