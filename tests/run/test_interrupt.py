"""Ctrl-C between steps, never within one."""

import os
import signal

import pytest

from handloom._run.interrupt import Interrupts
from tests.threads import in_a_thread

pytestmark = pytest.mark.once


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _usual_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupts_between_steps_are_raised_at_once():
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
        interrupts.held = True
        interrupts.release()  # Nothing has waited.
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


def test_interrupts_within_a_step_are_raised_once_at_its_end_but_a_second_one_at_once():
    with Interrupts() as interrupts:
        interrupts.held = True
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
        interrupts.held = True
        interrupts.release()
        interrupts.held = True
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


def test_interrupts_call_the_handler_of_the_user_at_the_end_of_a_step_and_restore_it():
    received = []
    signal.signal(signal.SIGINT, lambda signum, frame: received.append(signum))
    own = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.held = True
        press_ctrl_c()
        assert received == []
        interrupts.release()
        assert received == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is own


def handler_inside():
    with Interrupts() as interrupts:
        interrupts.held = True
        interrupts.release()
        return signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_interrupts_leave_a_handler_outside_of_python_as_it_is(handler):
    signal.signal(signal.SIGINT, handler)
    assert handler_inside() is handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_interrupts_do_nothing_in_another_thread():
    assert in_a_thread(handler_inside) is signal.getsignal(signal.SIGINT)


def test_interrupts_can_be_nested():
    with Interrupts() as outer:
        outer.held = True
        with Interrupts() as inner:
            inner.held = True
            press_ctrl_c()
            inner.release()
        with pytest.raises(KeyboardInterrupt):
            outer.release()
