"""Switches: one value for the process, another in a block of one thread."""

import pytest

from handloom._util.switch import Switch
from tests.threads import alternating, in_a_thread

pytestmark = pytest.mark.once


def test_switch_set_holds_in_the_process():
    switch = Switch(1)
    switch.set(2)
    assert switch.get() == in_a_thread(switch.get) == 2


def test_switch_set_as_a_block_holds_inside_for_this_thread():
    switch = Switch(1)
    with switch.set(2):
        assert (switch.get(), in_a_thread(switch.get)) == (2, 1)
        with switch.set(3):
            assert switch.get() == 3
        assert switch.get() == 2
        with pytest.raises(KeyError), switch.here(4):
            raise KeyError
        assert switch.get() == 2
    assert switch.get() == 1


def test_switch_set_within_a_block_ends_with_it():
    switch = Switch(1)
    with switch.here(2):
        switch.set(3)
        assert (switch.get(), in_a_thread(switch.get)) == (3, 1)
    assert switch.get() == 1


def test_switch_blocks_of_two_threads_may_overlap():
    switch, found = Switch(0), []

    def block(value):
        with switch.set(value):
            yield
            found.append(switch.get())
            yield
        found.append(switch.get())

    alternating(lambda: block(1), lambda: block(2))
    assert found == [1, 2, 0, 0]
    assert switch.get() == 0
