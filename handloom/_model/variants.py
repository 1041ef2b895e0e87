"""Functional and sequential instances of a model class, which itself does not change.

Keras makes a subclass functional by changing, in place, the bases of every class between it and `keras.Model`. With a
class in between, every later subclassed model would become functional too. Here each class gets a variant of its own
for its functional instances and one for its sequential instances. No other class inherits from a variant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from handloom._keras import keras

_variants: dict[tuple[type, type], Any] = {}


def variant(cls: type, kind: type) -> Any:
    """The class of the functional, or sequential, instances of a model class: itself, if it is of that kind."""
    if issubclass(cls, kind):
        return cls
    if (cls, kind) not in _variants:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_variant_of": cls}
        _variants[cls, kind] = type(cls.__name__, (cls, kind), names)
    return _variants[cls, kind]


def register_as_its_class(variant: type) -> None:
    """Registers a variant, so that a model is saved under the name of the user's class and loaded as that class.

    Called when a model is saved, because a class may be registered after its first functional instance was created.
    """
    cls = vars(variant).get("_variant_of")
    registered = "" if cls is None else keras.saving.get_registered_name(cls)
    if ">" in registered and keras.saving.get_registered_name(variant) != registered:
        register = keras.saving.register_keras_serializable(*registered.split(">", 1))
        register(variant)
        register(cls)


def is_inputs_and_outputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments define a functional model, by Keras's rule."""
    return len(args) == 2 or ("outputs" in kwargs and (len(args) == 1 or "inputs" in kwargs))


def is_list_of_layers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments define a sequential model."""
    return (
        len(args) == 1
        and "outputs" not in kwargs
        and isinstance(args[0], (list, tuple))
        and bool(args[0])
        and all(isinstance(layer, (keras.Layer, keras.KerasTensor)) for layer in args[0])
    )
