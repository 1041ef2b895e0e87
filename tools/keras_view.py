"""A pytest plugin: the test modules of Keras see `hl.Model` and its kinds where they import those of Keras.

Keras itself does not change: each module of Keras that a test module imports is replaced, in the test module only, by a
view that gives the replaced names and forwards everything else.
"""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import keras
from keras.src.models.functional import Functional

import handloom as hl
from handloom._model.steps import ModelSteps
from handloom._model.variants import variant

HELPER = "keras.src.testing.test_case"  # Defines models for the tests of layers.
KerasTrainer = keras.Model.__mro__[1]


class _OfAnyClass(type):
    """Functional models are instances, the class makes an `hl.Model`, and it equals the class that it replaces."""

    __hash__ = type.__hash__

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls is FunctionalModel and other is Functional)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Functional) if cls is FunctionalModel else super().__instancecheck__(instance)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return hl.Model(*args, **kwargs) if cls is FunctionalModel else super().__call__(*args, **kwargs)


class FunctionalModel(variant(hl.Model, Functional), metaclass=_OfAnyClass):  # type: ignore[misc]
    """Keras's class of functional models, which is not public."""


class Trainer(hl.Model):
    """Keras's class of what `keras.Model` adds to a layer, which is not public, to be mixed into a layer."""

    layers = ()

    def __init__(self) -> None:
        KerasTrainer.__init__(self)
        self._steps = ModelSteps(self)

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives the class the methods of the layer, which those of `keras.Model` hide."""
        super().__init_subclass__(**options)
        own, rest = cls.__mro__[: cls.__mro__.index(Trainer)], cls.__mro__[cls.__mro__.index(keras.Model) + 1 :]
        for name in ("build", "call", "compute_output_shape", "get_config", "from_config"):
            if not any(name in vars(base) for base in own):
                setattr(cls, name, next(vars(base)[name] for base in rest if name in vars(base)))


REPLACED = {
    id(kept): new
    for kept, new in [
        (keras.Model, hl.Model),
        (keras.Sequential, hl.Sequential),
        (Functional, FunctionalModel),
        (KerasTrainer, Trainer),
    ]
}


class View(types.ModuleType):
    """A module of Keras with some names replaced."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return seen(getattr(self._module, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)


def seen(value: Any) -> Any:
    """A value of a module of Keras, as the tests see it."""
    if isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "keras":
        return View(value)
    return REPLACED.get(id(value), value)


def pytest_configure() -> None:
    """Lets the imports of test modules give views."""
    actual = builtins.__import__

    def imported(name: str, *rest: Any, **named: Any) -> types.ModuleType:
        module = actual(name, *rest, **named)
        scope = (rest[0] if rest else named.get("globals")) or {}
        asking = scope.get("__name__", "")
        return seen(module) if asking == HELPER or asking.rpartition(".")[2].endswith("_test") else module

    builtins.__import__ = imported
    sys.modules.pop(HELPER, None)
