"""Signals are handled between steps, never within one."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, ClassVar, NoReturn, Self


class _Handler:
    """Handles signals inside a `with` block, in the main thread: Python handles them only there.

    Attributes:
        signals: The signals.
        replaces_default: Whether it also handles signals that Python leaves to the system.
    """

    signals: ClassVar[tuple[int, ...]] = (signal.SIGINT,)
    replaces_default: ClassVar[bool] = False

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        for signum in self.signals if threading.current_thread() is threading.main_thread() else ():
            before = signal.getsignal(signum)
            if callable(before) or (before is signal.SIG_DFL and self.replaces_default):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class Interrupts(_Handler):
    """Delays a keyboard interrupt while a step runs, so that no update is left half done.

    As a context manager it handles SIGINT. A second interrupt during one step is not delayed.

    Attributes:
        held: Whether an interrupt now waits for `release`.

    Example:
        `with Interrupts() as interrupts: ...; interrupts.held = True; step(batch); interrupts.release()`
    """

    held = False
    _waiting: tuple[int, FrameType | None] | None = None

    def release(self) -> None:
        """Stops delaying interrupts; one that has waited is handled now."""
        self.held = False
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._before[signal.SIGINT](*waiting)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.held and self._waiting is None:
            self._waiting = (signum, frame)
        else:
            self._before[signum](signum, frame)


class Signals(_Handler):
    """SIGTERM and Ctrl-C as a request to stop at the next good moment. A second one ends the process at once.

    As a context manager it handles both.

    Attributes:
        received: The number of the signal that has come, or `None`.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    replaces_default = True
    received: int | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
        elif signum == signal.SIGINT and hasattr(sys, "ps1"):  # A prompt or a notebook must stay alive.
            raise KeyboardInterrupt
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def stop(self) -> NoReturn:
        """Raises the exception with which the received signal usually ends a process."""
        assert self.received is not None
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + self.received)
