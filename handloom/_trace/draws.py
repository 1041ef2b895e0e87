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
from handloom._trace.python_state import PythonState
from handloom._util.patch import Patch
from handloom._util.switch import Switch

_KINDS = (np.random.Generator, np.random.RandomState, random.Random)
_GLOBAL = getattr(random.random, "__self__", None)
_BY_KERAS = ""
_drawn: Switch[list[str]] = Switch([])


class Draws:
    """Notices what is drawn from Python's and NumPy's global random numbers, and from generators of the user.

    Args:
        state: What the function that is compiled can read; among it are generators.

    Attributes:
        sources: From where numbers were drawn, as the user writes it; known after the block.
    """

    def __init__(self, state: PythonState) -> None:
        self._generators = {path: thing for path, thing in state.things if isinstance(thing, _KINDS)}
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
        by_keras = [name for name, generator in self._generators.items() if generator is _GLOBAL and _BY_KERAS in drawn]
        self.sources = [name for name in dict.fromkeys(drawn) if name not in (_BY_KERAS, *by_keras)]

    def _states(self) -> dict[str, str]:
        with np.printoptions(threshold=1000):  # In full, whatever the user prints.
            # The global ones show also what was imported by name. Other threads may draw from them too.
            alone = threading.active_count() == 1
            generators = {name: each for name, each in self._generators.items() if alone or each is not _GLOBAL}
            states = {name: repr(_state(generator)) for name, generator in generators.items()}
            return states | ({"np.random": repr(np.random.get_state())} if alone else {})


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
    """In place of the module from which Keras draws a seed for each new layer: the user has not drawn these."""
    return types.SimpleNamespace(randint=_noting(_BY_KERAS, randint))


_PATCH = Patch(
    *((random, name, functools.partial(_noting, "random")) for name in _functions_of(random, random.Random)),
    *((np.random, each, functools.partial(_noting, "np.random")) for each in _functions_of(np.random, _KINDS[1])),
    (np.random, "default_rng", _noting_unseeded),
    (seed_generator, "python_random", _default_seeds),
)
