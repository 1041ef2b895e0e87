"""Random numbers that Python and NumPy draw while a function is compiled: they are constants of its program."""

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from handloom._keras import seed_generator
from handloom._util.patch import Patch
from handloom._util.source_line import is_users
from handloom._util.switch import Switch

_KINDS = (np.random.Generator, np.random.RandomState, random.Random)
_seeds: Switch[list[tuple[int, int]]] = Switch([])
_unseeded: Switch[list[str]] = Switch([])


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
        """A block in which draws are noticed."""
        python, before = random.getstate(), self._states()
        with _PATCH, _seeds.here([]), _unseeded.here([]):
            yield
            expected, self.sources = _after_seeds(python, _seeds.get()), _unseeded.get()[:1]
        after = self._states()
        self.sources += [name for name in before if before[name] != after[name]]
        self.sources += ["random"] * (random.getstate() != expected)

    def _states(self) -> dict[str, str]:
        with np.printoptions(threshold=1000):  # In full, whatever the user prints.
            states = {name: repr(_state(generator)) for name, generator in self._generators.items()}
            return states | {"np.random": repr(np.random.get_state())}


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _after_seeds(state: Any, seeds: Iterable[tuple[int, int]]) -> Any:
    """The state of Python's random numbers after Keras has drawn default seeds, as each new layer does."""
    generator = random.Random()
    generator.setstate(state)
    for bounds in seeds:
        generator.randint(*bounds)
    return generator.getstate()


def _noting_seeds(original: Any) -> Any:
    def randint(*bounds: int) -> int:
        _seeds.get().append(bounds)  # type: ignore[arg-type]
        return int(original.randint(*bounds))

    return types.SimpleNamespace(randint=randint)


def _noting_unseeded(original: Callable[..., Any]) -> Callable[..., Any]:
    def default_rng(seed: Any = None) -> Any:
        if seed is None:
            _unseeded.get().append("np.random.default_rng()")
        return original(seed)

    return default_rng


_PATCH = Patch((seed_generator, "python_random", _noting_seeds), (np.random, "default_rng", _noting_unseeded))


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
    used = set(_used(function.__code__))
    yield from ((name, thing) for name, thing in function.__globals__.items() if name in used)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # A name that has no value yet.
            yield name, cell.cell_contents


def _used(code: types.CodeType) -> Iterator[str]:
    """The names in a function's code, and in that of the functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _used(inner)
