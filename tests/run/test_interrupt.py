"""Ctrl-C between steps, never within one."""

import os
import signal
import threading

import pytest

from handloom._run.interrupt import Interrupts

pytestmark = pytest.mark.once


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _usual_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_between_steps_comes_at_once():
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_an_interrupt_within_a_step_waits_for_its_end():
    done = []
    with Interrupts() as interrupts:
        interrupts.held = True
        press_ctrl_c()
        done.append("the rest of the step")
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
    assert done


def test_it_comes_once():
    with Interrupts() as interrupts:
        interrupts.held = True
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
        interrupts.held = True
        interrupts.release()


def test_a_second_one_within_a_step_is_not_held_back():
    with Interrupts() as interrupts:
        interrupts.held = True
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


def test_without_an_interrupt_release_does_nothing():
    with Interrupts() as interrupts:
        interrupts.held = True
        interrupts.release()
        assert not interrupts.held


def test_after_release_an_interrupt_comes_at_once():
    with Interrupts() as interrupts:
        interrupts.held = True
        interrupts.release()
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


def test_an_own_handler_is_called_in_its_turn_and_put_back():
    heard = []
    signal.signal(signal.SIGINT, lambda signum, frame: heard.append(signum))
    own = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.held = True
        press_ctrl_c()
        assert heard == []
        interrupts.release()
        assert heard == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is own


def test_the_handler_is_put_back_after_an_error_too():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), Interrupts():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_process_that_python_does_not_interrupt_is_left_alone(handler):
    signal.signal(signal.SIGINT, handler)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGINT) is handler
        interrupts.held = True
        interrupts.release()
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_another_thread_it_leaves_everything_as_it_is():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with Interrupts() as interrupts:
            interrupts.held = True
            interrupts.release()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_two_may_be_nested():
    with Interrupts() as outer:
        outer.held = True
        with Interrupts() as inner:
            inner.held = True
            press_ctrl_c()
            inner.release()
        with pytest.raises(KeyboardInterrupt):
            outer.release()
