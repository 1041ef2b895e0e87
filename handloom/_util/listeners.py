"""Functions that are called when something happens, registered for a block of one thread."""

import contextlib
from collections.abc import Callable
from typing import Any

from handloom._util.switch import Switch


class Listeners:
    """The functions to call when one kind of thing happens."""

    def __init__(self) -> None:
        self._listeners: Switch[tuple[Callable[..., None], ...]] = Switch(())

    def tell(self, *what: Any) -> None:
        """Calls the functions that are registered in the caller's context."""
        for listener in self._listeners.get():
            listener(*what)

    def added(self, listener: Callable[..., None]) -> contextlib.AbstractContextManager[None]:
        """Registers one more function for the block."""
        return self._listeners.here((*self._listeners.get(), listener))
