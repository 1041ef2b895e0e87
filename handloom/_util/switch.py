"""A setting of the process that a block of one thread can override."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, copy_context
from typing import Generic, TypeVar

T = TypeVar("T")


class Switch(Generic[T]):
    """Has one value for the process, and another inside a block.

    Args:
        value: The initial value.
    """

    def __init__(self, value: T) -> None:
        self._everywhere = value
        self._here: ContextVar[T] = ContextVar("here")

    def get(self) -> T:
        """The value in the caller's context."""
        return self._here.get(self._everywhere)

    def set(self, value: T) -> contextlib.AbstractContextManager[None]:
        """Sets the value from now on: for the caller's block, or, outside of any, for the process.

        Returns:
            A context manager. If it is used, the value holds only inside its block, and only for this thread.
        """
        before = self.get()
        self._assign(value)
        return self._instead(value, before)

    @contextlib.contextmanager
    def here(self, value: T) -> Iterator[None]:
        """Sets the value for a block of this thread."""
        token = self._here.set(value)
        try:
            yield
        finally:
            self._here.reset(token)

    def _assign(self, value: T) -> None:
        if self._here in copy_context():
            self._here.set(value)
        else:
            self._everywhere = value

    @contextlib.contextmanager
    def _instead(self, value: T, before: T) -> Iterator[None]:
        self._assign(before)
        with self.here(value):
            yield
