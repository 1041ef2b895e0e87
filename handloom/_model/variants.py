"""Functional and sequential instances of a model class that itself stays as it is.

Keras makes a functional model of a subclass by changing the bases of every class between it and `keras.Model`, in
place: with one class in between, every later subclassed model would become functional too. Here each class gets a
variant of its own for the purpose, which nobody else descends from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from handloom._keras import keras

_made: dict[tuple[type, type], Any] = {}


def variant(cls: type, kind: type) -> Any:
    """The class of the functional, or sequential, instances of a model class."""
    if (cls, kind) not in _made:
        _made[cls, kind] = _make(cls, kind)
    return _made[cls, kind]


def _make(cls: type, kind: type) -> type:
    return type(cls.__name__, (cls, kind), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def register_as_its_class(variant: type) -> None:
    """Has a variant saved under the name of the class that the user knows, and loaded as that.

    A class may be registered after its first functional instance; hence where one is about to be saved.
    """
    cls = next((known for (known, _), made in _made.items() if made is variant), None)
    registered = "" if cls is None else keras.saving.get_registered_name(cls)
    if ">" in registered and keras.saving.get_registered_name(variant) != registered:
        register = keras.saving.register_keras_serializable(*registered.split(">", 1))
        register(variant)
        register(cls)


def is_inputs_and_outputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's arguments are those of a functional one, as Keras tells."""
    return len(args) == 2 or ("outputs" in kwargs and (len(args) == 1 or "inputs" in kwargs))


def is_list_of_layers(args: Sequence[Any]) -> bool:
    """Whether a model's arguments are those of a sequential one."""
    return (
        len(args) == 1
        and isinstance(args[0], (list, tuple))
        and bool(args[0])
        and all(isinstance(layer, (keras.Layer, keras.KerasTensor)) for layer in args[0])
    )
