"""Names for variables that are the same in every process: the place of a variable, not the name that Keras gave it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from handloom._keras import Variable, keras, trained_by
from handloom.backends import backend
from handloom.errors import ArgumentError

Stateful: TypeAlias = Any
"""An object with methods `state()` and `restore(state)`: a feed, a callback, an object of the user's."""

KERAS_OBJECTS = (keras.Layer, keras.Metric, keras.optimizers.Optimizer, keras.random.SeedGenerator)

# Attributes in which Keras keeps its own records. Their variables have another place, or belong to another object.
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
    """All variables and arrays in a structure by their place, and the other objects in it that have a state.

    Variables are found in dicts, lists and tuples, and in the attributes of Keras's layers, models, optimizers, metrics
    and seed generators: `model.encoder.kernel`, `model.layers[1].bias`. A variable with several places has the name of
    the first. A slot of an optimizer is named after the variable that it belongs to,
    `optimizer.momentums[model.encoder.kernel]`, so that it stays with it when variables are added or removed.

    Raises:
        ArgumentError: There is anything else in the structure.
    """
    walk = _Walk(state)
    return walk.variables, walk.stateful


def keras_objects(state: Any) -> dict[str, Any]:
    """The layers, models, optimizers, metrics and seed generators in a structure, by their place."""
    return _Walk(state).objects


@dataclasses.dataclass(frozen=True)
class _Trained:
    """The optimizer whose attributes are visited; they also refer to variables and layers that it only trains.

    Attributes:
        owned: The `id`s of its own variables.
        labels: The names of the variables that it trains.
    """

    owned: set[int]
    labels: list[str]


class _Walk:
    """One walk through a structure. It visits optimizers last, when the variables that they train have names."""

    def __init__(self, state: Any) -> None:
        self.variables: dict[str, Variable | np.ndarray] = {}
        self.stateful: dict[str, Stateful] = {}
        self.objects: dict[str, Any] = {}
        self._seen: set[int] = set()
        self._optimizers: list[tuple[str, keras.Optimizer]] = []
        self.visit("", state)
        self._names = {id(variable): name for name, variable in self.variables.items()}
        for name, optimizer in self._optimizers:
            self._visit_optimizer(name, optimizer)

    def visit(self, name: str, thing: Any) -> None:
        """Visits an object that the user gave, which must have a state."""
        if isinstance(thing, (Mapping, list, tuple)):
            for inner_name, inner in _inside(name, thing):
                self.visit(inner_name, inner)
        elif isinstance(thing, (keras.Variable, *KERAS_OBJECTS)):
            self._visit_attribute(name, thing)
        elif isinstance(thing, np.ndarray):
            self._add(name, thing)
        elif all(callable(getattr(thing, method, None)) for method in ("state", "restore")):
            self.stateful[name] = thing
        elif thing is not None:
            raise ArgumentError(
                f"HL022: {name or 'state'} is of type {type(thing).__name__}, which has no state that can be saved.",
                fix="Pass models, layers, optimizers, metrics, variables, NumPy arrays, feeds, or objects with methods "
                "state() and restore(state), in dicts and lists.",
            )

    def _visit_attribute(self, name: str, thing: Any, of: _Trained | None = None) -> None:
        """Visits the value of an attribute, which may be anything; ignores it if it holds no variables."""
        if isinstance(thing, keras.Variable):
            if of is None or id(thing) in of.owned:
                self._add_once(name, thing)
        elif isinstance(thing, keras.optimizers.Optimizer):
            if of is None:
                self._optimizers.append((name, thing))
            else:
                self._visit_optimizer(name, thing)
        elif not isinstance(thing, KERAS_OBJECTS):
            for inner_name, inner in _inside(name, thing, of.labels if of else ()):
                self._visit_attribute(inner_name, inner, of)
        elif of is None or not isinstance(thing, keras.Layer):
            self._visit_inside(name, thing)

    def _visit_optimizer(self, name: str, optimizer: keras.Optimizer) -> None:
        trained = enumerate(trained_by(optimizer))
        labels = [self._names.get(id(variable), str(index)) for index, variable in trained]
        self._visit_inside(name, optimizer, _Trained(set(map(id, optimizer.variables)), labels))

    def _visit_inside(self, name: str, thing: Any, of: _Trained | None = None) -> None:
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        self.objects[name] = thing
        for inner_name, inner in _attributes(name, thing):
            self._visit_attribute(inner_name, inner, of)
        for index, variable in enumerate(getattr(thing, "variables", ())):  # Also those inside other objects.
            self._add_once(f"{name}.variables[{index}]", variable)

    def _add_once(self, name: str, variable: Variable) -> None:
        if id(variable) not in self._seen:
            self._seen.add(id(variable))
            self._add(name, variable)

    def _add(self, name: str, variable: Variable | np.ndarray) -> None:
        unique, count = name, 1
        while unique in self.variables:  # Attributes `kernel` and `_kernel`, for example.
            unique, count = f"{name}#{count}", count + 1
        self.variables[unique] = variable


def _inside(name: str, thing: Any, labels: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """The items of a dict or list by name. If a list has an item for each label, the labels name its items."""
    if isinstance(thing, Mapping):
        yield from ((_dotted(name, str(key)), inner) for key, inner in thing.items())
    elif isinstance(thing, (list, tuple)):
        known = labels if len(labels) == len(thing) else range(len(thing))
        yield from ((f"{name}[{label}]", inner) for label, inner in zip(known, thing, strict=True))


def _attributes(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object: public ones first, and last the list of layers, for layers with no other name."""
    attributes = backend.attributes(thing)
    for attribute in sorted(attributes, key=lambda key: (key == "_layers", key.startswith("_"), key)):
        if attribute not in _BOOKKEEPING:
            yield _dotted(name, attribute.lstrip("_")), attributes[attribute]


def _dotted(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
