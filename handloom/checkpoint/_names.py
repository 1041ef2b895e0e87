"""Names for variables that hold from one process to the next: where a variable stands, not what Keras called it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from handloom._keras import Variable, keras
from handloom.backends import backend

Stateful: TypeAlias = Any
"""Something with methods `state()` and `restore(state)`: a feed, a callback, one of the user's own."""

_KERAS_OBJECTS = (keras.Layer, keras.Metric, keras.optimizers.Optimizer, keras.random.SeedGenerator)

# Keras's own books. What stands in them has a place elsewhere, or is not this object's.
_BOOKS = {
    "_functional",
    "_metrics",
    "_non_trainable_variables",
    "_operations",
    "_operations_by_depth",
    "_seed_generators",
    "_tracker",
    "_trainable_variables",
    "_variables",
}


def named(state: Any) -> tuple[dict[str, Variable | np.ndarray], dict[str, Stateful]]:
    """All variables and arrays in a structure by where they are, and what else in it has a state.

    A variable is found in dicts, lists and tuples, and in the attributes of Keras's layers, models, optimizers, metrics
    and seed generators: `model.encoder.kernel`, `model.layers[1].bias`, `optimizer.momentums[0]`. One that is at
    several places has the name of the first.

    Raises:
        TypeError: If there is anything else in the structure.
    """
    walk = _Walk()
    walk.into("", state)
    return walk.variables, walk.stateful


class _Walk:
    """One walk through a structure."""

    def __init__(self) -> None:
        self.variables: dict[str, Variable | np.ndarray] = {}
        self.stateful: dict[str, Stateful] = {}
        self._seen: set[int] = set()

    def into(self, name: str, thing: Any) -> None:
        """Visits a thing of the user's, which must be something that has a state."""
        if isinstance(thing, Mapping):
            for key, inner in thing.items():
                self.into(_dotted(name, str(key)), inner)
        elif isinstance(thing, (list, tuple)):
            for index, inner in enumerate(thing):
                self.into(f"{name}[{index}]", inner)
        elif isinstance(thing, (keras.Variable, *_KERAS_OBJECTS)):
            self._keras_thing(name, thing)
        elif isinstance(thing, np.ndarray):
            self._add(name, thing)
        elif all(callable(getattr(thing, method, None)) for method in ("state", "restore")):
            self.stateful[name] = thing
        elif thing is not None:
            raise TypeError(
                f"{name or 'state'} is of type {type(thing).__name__}, of which no state can be saved. Pass models, "
                "layers, optimizers, metrics, variables, NumPy arrays, feeds, or objects with methods state() and "
                "restore(state), in dicts and lists."
            )

    def _keras_thing(self, name: str, thing: Any, owned: set[int] | None = None) -> None:
        """Visits what stands in an attribute.

        Args:
            name: Where it is.
            thing: Anything; what holds no variables is passed over.
            owned: The variables of the optimizer that it is in, which also knows variables that it only trains.
        """
        if isinstance(thing, keras.Variable):
            if id(thing) not in self._seen and (owned is None or id(thing) in owned):
                self._seen.add(id(thing))
                self._add(name, thing)
        elif isinstance(thing, _KERAS_OBJECTS):
            if id(thing) not in self._seen and not (owned and isinstance(thing, keras.Layer)):
                self._seen.add(id(thing))
                self._attributes(name, thing)
        elif isinstance(thing, Mapping):
            for key, inner in thing.items():
                self._keras_thing(_dotted(name, str(key)), inner, owned)
        elif isinstance(thing, (list, tuple)):
            for index, inner in enumerate(thing):
                self._keras_thing(f"{name}[{index}]", inner, owned)

    def _attributes(self, name: str, thing: Any) -> None:
        is_optimizer = isinstance(thing, keras.optimizers.Optimizer)
        owned = set(map(id, thing.variables)) if is_optimizer else None
        for attribute, value in _in_order(backend.attributes(thing)):
            self._keras_thing(_dotted(name, attribute.lstrip("_")), value, owned)
        # What it keeps inside other objects; Keras knows of that too.
        for index, variable in enumerate(getattr(thing, "variables", ())):
            self._keras_thing(f"{name}.variables[{index}]", variable, owned)

    def _add(self, name: str, variable: Variable | np.ndarray) -> None:
        unique, count = name, 1
        while unique in self.variables:  # `kernel` and `_kernel`, say.
            unique, count = f"{name}#{count}", count + 1
        self.variables[unique] = variable


def _in_order(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Attributes by name, the public ones first; last the layers of a model, for those that have no other name."""
    names = [name for name in attributes if name not in _BOOKS]
    for name in sorted(names, key=lambda name: (name == "_layers", name.startswith("_"), name)):
        yield name, attributes[name]


def _dotted(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
