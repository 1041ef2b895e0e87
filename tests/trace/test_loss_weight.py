"""The weight of a step, which accumulated gradients are weighted by."""

import pytest

from handloom._trace.loss_weight import step_weight, weight_of_step
from tests.threads import in_a_thread


def test_step_weight_holds_in_its_block_in_its_thread_also_after_an_error():
    assert weight_of_step() == 1
    with step_weight(32):
        with step_weight(7.5):
            assert weight_of_step() == 7.5
        with pytest.raises(KeyError), step_weight(8):
            raise KeyError
        assert weight_of_step() == 32
        assert in_a_thread(weight_of_step) == 1
    assert weight_of_step() == 1
