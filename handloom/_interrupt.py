"""Signals between steps, never within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Holds a keyboard interrupt back while a step runs, so that no update is left half done.

    As a context manager it takes over SIGINT. A second interrupt during one step is not held back.

    Attributes:
        held: Whether an interrupt now waits for `release`.

    Example:
        `with Interrupts() as interrupts: ...; interrupts.held = True; step(batch); interrupts.release()`
    """

    def __init__(self) -> None:
        self.held = False
        self._waiting: tuple[int, FrameType | None] | None = None
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if _is_main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def release(self) -> None:
        """Interrupts wait no longer; one that did comes now."""
        self.held = False
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._before(*waiting)

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        if self.held and self._waiting is None:
            self._waiting = (signum, frame)
        else:
            self._before(signum, frame)


class Signals:
    """SIGTERM and Ctrl-C as a wish to stop after the step at hand. A second one stops at once."""

    received: int | None = None

    def __enter__(self) -> Signals:
        self._before = {}
        if _is_main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(signum)) or signal.getsignal(signum) is signal.SIG_DFL:
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            self.stop(signum)
        self.received = signum

    def stop(self, signum: int) -> None:
        """Ends the process as the signal would have."""
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def _is_main_thread() -> bool:
    """Whether signals come here: Python delivers them in the main thread alone."""
    return threading.current_thread() is threading.main_thread()
