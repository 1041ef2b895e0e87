"""Patches of other libraries that only the code that enters them sees."""

import contextlib
import functools
import threading
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

Replacement: TypeAlias = tuple[Any, str, Callable[[Any], Any]]
"""An owner, the name of its attribute, and a function from that to its replacement."""

_LOCK = threading.Lock()


class Patch(contextlib.ContextDecorator):
    """Replaces attributes of classes and modules inside `with patch:`; also a decorator of functions.

    Each attribute is replaced once, however many threads are inside. When the last thread leaves, the attribute is the
    same object as before. Code that runs elsewhere at the same time gets the original. A patch can be entered again
    inside itself. Each attribute belongs to one patch.

    Args:
        patches: Triples (owner, name, make). `make` takes the original and returns its replacement: for a
            property, from getter to getter; for an object that is not callable, an object with the attributes used.
            For the `__code__` of a function, which replaces it wherever it was imported by name, `make` returns a
            function with the same arguments and without a closure, which everyone gets.
        when: Whether the caller gets the replacement. By default it does in a context that has entered the patch.
    """

    def __init__(self, *patches: Replacement, when: Callable[[], bool] | None = None) -> None:
        self._replacements = patches
        self._depth: ContextVar[int] = ContextVar("depth", default=0)
        self._when = when or self._is_entered
        self._users = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with _LOCK:
            if not self._users:
                for replacement in self._replacements:
                    self._undo.callback(_replace(*replacement, self._when))
            self._users += 1
        self._depth.set(self._depth.get() + 1)

    def __exit__(self, *_: object) -> None:
        self._depth.set(self._depth.get() - 1)
        with _LOCK:
            self._users -= 1
            if not self._users:
                self._undo.close()

    def _is_entered(self) -> bool:
        return self._depth.get() > 0


def _replace(owner: Any, name: str, make: Callable[[Any], Any], when: Callable[[], bool]) -> Callable[[], None]:
    """Replaces an attribute; returns a function that restores it."""
    if name == "__code__":
        code = owner.__code__
        owner.__code__ = make(types.FunctionType(code, owner.__globals__)).__code__
        return functools.partial(setattr, owner, name, code)
    is_own = name in vars(owner)
    original = vars(owner)[name] if is_own else getattr(owner, name)
    setattr(owner, name, _either(original, make, when))
    return functools.partial(setattr, owner, name, original) if is_own else functools.partial(delattr, owner, name)


def _either(original: Any, make: Callable[[Any], Any], when: Callable[[], bool]) -> Any:
    """An object that is the replacement where `when()` holds, and the original elsewhere."""
    if isinstance(original, property):
        return property(_either(original.fget, make, when), original.fset, original.fdel, original.__doc__)
    replacement = make(original)
    if not callable(original):
        return _EitherObject(original, replacement, when)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (replacement if when() else original)(*args, **kwargs)

    return call


class _EitherObject:
    def __init__(self, original: Any, replacement: Any, when: Callable[[], bool]) -> None:
        self._original, self._replacement, self._when = original, replacement, when

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replacement if self._when() else self._original, name)
