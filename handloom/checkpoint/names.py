"""Names for variables that hold from one process to the next: where a variable stands, not what Keras called it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from handloom._keras import Variable, keras, trained_by
from handloom.backends import backend
from handloom.errors import ArgumentError

Stateful: TypeAlias = Any
"""Something with methods `state()` and `restore(state)`: a feed, a callback, one of the user's own."""

_KERAS_OBJECTS = (keras.Layer, keras.Metric, keras.optimizers.Optimizer, keras.random.SeedGenerator)

# Keras's own books. What stands in them has a place elsewhere, or is not this object's.
_BOOKKEEPING = {
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
    and seed generators: `model.encoder.kernel`, `model.layers[1].bias`. One that is at several places has the name of
    the first. What an optimizer keeps for each variable that it trains has the name of that,
    `optimizer.momentums[model.encoder.kernel]`, so that it stays with it when others come and go.

    Raises:
        TypeError: If there is anything else in the structure.
    """
    walk = _Walk(state)
    return walk.variables, walk.stateful


def keras_objects(state: Any) -> dict[str, Any]:
    """The layers, models, optimizers, metrics and seed generators in a structure, named likewise."""
    return _Walk(state).objects


class _Walk:
    """One walk through a structure; optimizers come last, when what they train has its names."""

    def __init__(self, state: Any) -> None:
        self.variables: dict[str, Variable | np.ndarray] = {}
        self.stateful: dict[str, Stateful] = {}
        self.objects: dict[str, Any] = {}
        self._seen: set[int] = set()
        self._optimizers: list[tuple[str, keras.Optimizer]] = []
        self.into("", state)
        names = {id(variable): name for name, variable in self.variables.items()}
        for name, optimizer in self._optimizers:
            self._optimizer(name, optimizer, names)

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
            raise ArgumentError(
                f"HL022: {name or 'state'} is of type {type(thing).__name__}, of which no state can be saved. Pass models, "
                "layers, optimizers, metrics, variables, NumPy arrays, feeds, or objects with methods state() and "
                "restore(state), in dicts and lists.",
            )

    def _keras_thing(self, name: str, thing: Any) -> None:
        """Visits what stands in an attribute, which may be anything; what holds no variables is passed over."""
        if isinstance(thing, keras.Variable):
            self._variable(name, thing)
        elif isinstance(thing, keras.optimizers.Optimizer):
            self._optimizers.append((name, thing))
        elif isinstance(thing, _KERAS_OBJECTS):
            if self._is_new(name, thing):
                self._attributes(name, thing)
        else:
            for inner_name, inner in _inside(name, thing):
                self._keras_thing(inner_name, inner)

    def _attributes(self, name: str, thing: Any) -> None:
        for attribute, value in _in_order(backend.attributes(thing)):
            self._keras_thing(_dotted(name, attribute.lstrip("_")), value)
        self._rest(name, thing)

    def _rest(self, name: str, thing: Any) -> None:
        """What it keeps inside other objects; Keras knows of that too."""
        for index, variable in enumerate(getattr(thing, "variables", ())):
            self._variable(f"{name}.variables[{index}]", variable)

    def _optimizer(self, name: str, optimizer: keras.Optimizer, names: Mapping[int, str]) -> None:
        """Visits an optimizer, which also knows variables and layers that it only trains.

        Args:
            name: Where it is.
            optimizer: The optimizer; others may be inside it.
            names: Of the variables in all else.
        """
        if not self._is_new(name, optimizer):
            return
        owned, trained = set(map(id, optimizer.variables)), trained_by(optimizer)
        labels = [names.get(id(variable), str(index)) for index, variable in enumerate(trained)]

        def visit(name: str, thing: Any) -> None:
            if isinstance(thing, keras.Variable):
                if id(thing) in owned:
                    self._variable(name, thing)
            elif isinstance(thing, keras.optimizers.Optimizer):
                self._optimizer(name, thing, names)
            elif isinstance(thing, (keras.Metric, keras.random.SeedGenerator)):
                self._keras_thing(name, thing)
            elif not isinstance(thing, keras.Layer):
                for inner_name, inner in _inside(name, thing, labels):
                    visit(inner_name, inner)

        for attribute, value in _in_order(backend.attributes(optimizer)):
            visit(_dotted(name, attribute.lstrip("_")), value)
        self._rest(name, optimizer)

    def _is_new(self, name: str, thing: Any) -> bool:
        if id(thing) in self._seen:
            return False
        self._seen.add(id(thing))
        self.objects[name] = thing
        return True

    def _variable(self, name: str, variable: Variable) -> None:
        if id(variable) not in self._seen:
            self._seen.add(id(variable))
            self._add(name, variable)

    def _add(self, name: str, variable: Variable | np.ndarray) -> None:
        unique, count = name, 1
        while unique in self.variables:  # `kernel` and `_kernel`, say.
            unique, count = f"{name}#{count}", count + 1
        self.variables[unique] = variable


def _inside(name: str, thing: Any, labels: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """What is in a dict or list, by name; in a list with one item for each label by that."""
    if isinstance(thing, Mapping):
        yield from ((_dotted(name, str(key)), inner) for key, inner in thing.items())
    elif isinstance(thing, (list, tuple)):
        known = labels if len(labels) == len(thing) else range(len(thing))
        yield from ((f"{name}[{label}]", inner) for label, inner in zip(known, thing, strict=True))


def _in_order(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Attributes by name, the public ones first; last the layers of a model, for those that have no other name."""
    names = [name for name in attributes if name not in _BOOKKEEPING]
    for name in sorted(names, key=lambda name: (name == "_layers", name.startswith("_"), name)):
        yield name, attributes[name]


def _dotted(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
