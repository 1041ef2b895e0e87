"""A setting of the process that a block of one thread can override."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Switch(Generic[T]):
    """Has one value for the process, and another inside a block.

    Args:
        value: The initial value.
    """

    def __init__(self, value: T) -> None:
        self._everywhere = value
        self._here: ContextVar[tuple[T, ...]] = ContextVar("here", default=())

    def get(self) -> T:
        """The value in the caller's context."""
        here = self._here.get()
        return here[-1] if here else self._everywhere

    def set(self, value: T) -> contextlib.AbstractContextManager[None]:
        """Sets the value from now on: for the caller's block, or, outside of any, for the process.

        Returns:
            A context manager. If it is used, the value holds only inside its block, and only for this thread.
        """
        here, everywhere = self._here.get(), self._everywhere
        if here:
            self._here.set((*here[:-1], value))
        else:
            self._everywhere = value
        return self._instead(value, here, everywhere)

    @contextlib.contextmanager
    def here(self, value: T) -> Iterator[None]:
        """Sets the value for a block of this thread."""
        token = self._here.set((*self._here.get(), value))
        try:
            yield
        finally:
            self._here.reset(token)

    @contextlib.contextmanager
    def _instead(self, value: T, here: tuple[T, ...], everywhere: T) -> Iterator[None]:
        self._here.set(here)
        self._everywhere = everywhere
        with self.here(value):
            yield
