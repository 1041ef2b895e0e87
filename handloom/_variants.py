"""Functional and sequential instances of a model class that itself stays as it is.

Keras makes a functional model of a subclass by changing the bases of every class between it and `keras.Model`, in
place: with one class in between, every later subclassed model would become functional too. Here each class gets a
variant of its own for the purpose, which nobody else descends from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from handloom._keras import keras


@functools.cache
def variant(cls: Any, kind: Any) -> Any:
    """A class for functional, or sequential, instances of a model class, which itself stays as it is."""
    made = type(cls.__name__, (cls, kind), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    registered = keras.saving.get_registered_name(cls)
    if ">" in registered:
        # Saved under the name of the class that the user knows, loaded as that.
        register = keras.saving.register_keras_serializable(*registered.split(">", 1))
        register(made)
        register(cls)
    return made


def is_inputs_and_outputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    given = len(args) + ("inputs" in kwargs) + ("outputs" in kwargs)
    return given >= 2 and not (len(args) < 2 and "outputs" not in kwargs)


def is_list_of_layers(args: Sequence[Any]) -> bool:
    return (
        len(args) == 1
        and isinstance(args[0], (list, tuple))
        and bool(args[0])
        and all(isinstance(layer, (keras.Layer, keras.KerasTensor)) for layer in args[0])
    )
