"""What a plain step trains, as the model that callbacks know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import optree

from handloom._keras import keras
from handloom.errors import StepError
from handloom.optimizers import NamedOptimizers


@contextlib.contextmanager
def trained(state: Any) -> Iterator[Any]:
    """What callbacks are to see as `self.model`, for as long as training runs.

    The model that `state` names; several models, or only layers and variables, held together in one; or a stand-in
    that can stop the training and nothing else. Its `optimizer` is the one in `state`, or all of them by name.
    """
    paths, leaves, _ = optree.tree_flatten_with_path(state)
    found = {_name(path): leaf for path, leaf in zip(paths, leaves, strict=True)}
    optimizers = {name: leaf for name, leaf in found.items() if isinstance(leaf, keras.optimizers.Optimizer)}
    model = _model(found)
    with _with_optimizer(model, optimizers):
        yield model


@keras.saving.register_keras_serializable("handloom")
class Trained(keras.Model):
    """All that a plain step trains, in one: each thing an attribute, under its name in `state`.

    Getting, setting, saving and loading weights concerns them all.

    Args:
        parts: Models, layers and variables by name.
        kwargs: As for `keras.Model`.
    """

    def __init__(self, parts: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Not the parts themselves: Keras would find and save them twice.
        self._part_names = tuple(f"{name}_" if hasattr(self, name) else name for name in parts)
        for name, part in zip(self._part_names, parts.values(), strict=True):
            setattr(self, name, part)
        self.built = True

    def get_config(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self._part_names}
        if any(isinstance(part, keras.Variable) for part in parts.values()):
            raise StepError(
                "HL207: What this step trains is no model and cannot be saved as one; save its weights alone: "
                "save_weights_only=True.",
            )
        return {"parts": {name: keras.saving.serialize_keras_object(part) for name, part in parts.items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Trained:
        deserialize = keras.saving.deserialize_keras_object
        return cls({name: deserialize(part, custom_objects) for name, part in config["parts"].items()})


class NullModel:
    """Stands for the model where a plain step names none."""

    def __init__(self) -> None:
        self.stop_training = False
        self.optimizer = None

    def _no_weights(self, *_: Any, **__: Any) -> NoReturn:
        raise StepError(
            "HL208: A callback asks for the weights of the model, and hl.fit was told of none: pass what the step trains, "
            'hl.fit(..., state={"model": model}).',
        )

    get_weights = set_weights = save_weights = load_weights = save = _no_weights


def _model(found: dict[str, Any]) -> Any:
    models = [leaf for leaf in found.values() if isinstance(leaf, keras.Model)]
    if len(models) == 1:
        return models[0]
    parts = {name: leaf for name, leaf in found.items() if isinstance(leaf, (keras.Layer, keras.Variable))}
    return Trained(parts) if parts else NullModel()


@contextlib.contextmanager
def _with_optimizer(model: Any, optimizers: dict[str, keras.Optimizer]) -> Iterator[None]:
    """Lets callbacks find at the model what trains it, and leaves the model as it was."""
    if not optimizers:
        yield
        return
    attributes = vars(model)  # Not by `setattr`, in which Keras takes a part.
    before = {"optimizer": attributes["optimizer"]} if "optimizer" in attributes else {}
    attributes["optimizer"] = next(iter(optimizers.values())) if len(optimizers) == 1 else NamedOptimizers(optimizers)
    try:
        yield
    finally:
        del attributes["optimizer"]
        attributes.update(before)


def _name(path: tuple[Any, ...]) -> str:
    """A place in a structure as an identifier: `nets_critic` for `{"nets": {"critic": ...}}`."""
    return "_".join(str(part) if str(part).isidentifier() else f"model_{part}" for part in path) or "model"
