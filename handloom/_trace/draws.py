"""Random numbers that Python and NumPy draw while a function is compiled: they are constants of its program."""

import contextlib
import functools
import random
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from handloom._keras import seed_generator
from handloom._util.codes import codes_of
from handloom._util.patch import Patch
from handloom._util.source_line import is_users
from handloom._util.switch import Switch

_KINDS = (np.random.Generator, np.random.RandomState, random.Random)
_drawn: Switch[list[str]] = Switch([])


class Draws:
    """Notices what is drawn from Python's and NumPy's global random numbers, and from generators of the user.

    Generators are found among the names that the function, and the user's functions that it names, use in their
    code, and among the attributes of the function's object.

    Args:
        function: The function that is compiled.

    Attributes:
        sources: From where numbers were drawn, as the user writes it; known after the block.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._generators = {name: thing for name, thing in _names(function, set()) if isinstance(thing, _KINDS)}
        self.sources: list[str] = []

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """A block in which draws are noticed, those of this thread alone."""
        before = self._states()
        with _PATCH, _drawn.here([]):
            yield
            drawn = _drawn.get()
        after = self._states()
        drawn += [name for name in before if before[name] != after.get(name, before[name])]
        self.sources = list(dict.fromkeys(drawn))

    def _states(self) -> dict[str, str]:
        with np.printoptions(threshold=1000):  # In full, whatever the user prints.
            states = {name: repr(_state(generator)) for name, generator in self._generators.items()}
            # Shows also what was imported by name. Other threads may draw from it too.
            return states | ({"np.random": repr(np.random.get_state())} if threading.active_count() == 1 else {})


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        _drawn.get().append(name)
        return original(*args, **kwargs)

    return draw


def _noting_unseeded(original: Callable[..., Any]) -> Callable[..., Any]:
    def default_rng(seed: Any = None) -> Any:
        if seed is None:
            _drawn.get().append("np.random.default_rng()")
        return original(seed)

    return default_rng


def _functions_of(module: Any, kind: type) -> list[str]:
    """The functions of a module that draw from its global generator."""
    others = ("seed", "getstate", "setstate", "get_state", "set_state")
    found = {name: getattr(getattr(module, name), "__self__", None) for name in dir(module) if name not in others}
    return [name for name, owner in found.items() if isinstance(owner, kind) and not name.startswith("_")]


def _default_seeds(_: Any, randint: Callable[..., int] = random.randint) -> Any:
    """In place of the module from which Keras draws a seed for each new layer: these draws are not noted."""
    return types.SimpleNamespace(randint=randint)


_PATCH = Patch(
    *((random, name, functools.partial(_noting, "random")) for name in _functions_of(random, random.Random)),
    *((np.random, each, functools.partial(_noting, "np.random")) for each in _functions_of(np.random, _KINDS[1])),
    (np.random, "default_rng", _noting_unseeded),
    (seed_generator, "python_random", _default_seeds),
)


def _names(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What a function can use by name: its closure, the globals in its code, the attributes of its object."""
    if isinstance(function, types.MethodType):
        yield from _names(function.__func__, seen)
        yield from ((f"self.{name}", thing) for name, thing in getattr(function.__self__, "__dict__", {}).items())
    elif hasattr(function, "__wrapped__"):
        yield from _names(function.__wrapped__, seen)
    elif isinstance(function, functools.partial):
        yield from _names(function.func, seen)
    elif isinstance(function, types.FunctionType) and id(function) not in seen:
        seen.add(id(function))
        for name, thing in _named_in(function):
            yield name, thing
            if isinstance(thing, types.FunctionType) and is_users(thing.__code__.co_filename):
                yield from _names(thing, seen)


def _named_in(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    used = {name for code in codes_of(function) for name in code.co_names}
    yield from ((name, thing) for name, thing in function.__globals__.items() if name in used)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # A name that has no value yet.
            yield name, cell.cell_contents
