"""Functions that are called when something happens, registered for a block of one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


class Listeners:
    """The functions to call when one kind of thing happens."""

    def __init__(self) -> None:
        self._listeners: ContextVar[tuple[Callable[..., None], ...]] = ContextVar("listeners", default=())

    def tell(self, *what: Any) -> None:
        """Calls the functions that are registered in the caller's context."""
        for listener in self._listeners.get():
            listener(*what)

    @contextlib.contextmanager
    def added(self, listener: Callable[..., None]) -> Iterator[None]:
        """Registers one more function for the block."""
        token = self._listeners.set((*self._listeners.get(), listener))
        try:
            yield
        finally:
            self._listeners.reset(token)
