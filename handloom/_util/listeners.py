"""Functions that want to be told of something, for a block of one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


class Listeners:
    """Those that are told of one kind of thing."""

    def __init__(self) -> None:
        self._listeners: ContextVar[tuple[Callable[..., None], ...]] = ContextVar("listeners", default=())

    def tell(self, *what: Any) -> None:
        """Calls all that listen where the caller runs."""
        for listener in self._listeners.get():
            listener(*what)

    @contextlib.contextmanager
    def added(self, listener: Callable[..., None]) -> Iterator[None]:
        """One more listens inside."""
        token = self._listeners.set((*self._listeners.get(), listener))
        try:
            yield
        finally:
            self._listeners.reset(token)
