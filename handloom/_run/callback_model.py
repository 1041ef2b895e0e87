"""The model that callbacks see while a plain step trains."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import optree

from handloom._keras import keras
from handloom.errors import StepError
from handloom.optimizers import NamedOptimizers


@contextlib.contextmanager
def callback_model(state: Any) -> Iterator[Any]:
    """The object that callbacks see as `self.model` while a plain step trains.

    It is the only model in `state`; or one model that holds several models, or only layers and variables; or a null
    object that can do nothing but stop the training. Its `optimizer` is the optimizer in `state`, or all of them by
    name.
    """
    paths, leaves, _ = optree.tree_flatten_with_path(state)
    found = {_name(path): leaf for path, leaf in zip(paths, leaves, strict=True)}
    optimizers = {name: leaf for name, leaf in found.items() if isinstance(leaf, keras.optimizers.Optimizer)}
    model = _model(found)
    with _with_optimizer(model, optimizers):
        yield model


@keras.saving.register_keras_serializable("handloom")
class JointModel(keras.Model):
    """Several models, layers and variables as one model: each is an attribute, under its name in `state`.

    Getting, setting, saving and loading weights includes all of them.

    Args:
        parts: Models, layers and variables by name.
        kwargs: As for `keras.Model`.
    """

    def __init__(self, parts: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Only the names, not the parts: Keras would find and save the parts twice.
        self._part_names = tuple(f"{name}_" if hasattr(self, name) else name for name in parts)
        for name, part in zip(self._part_names, parts.values(), strict=True):
            setattr(self, name, part)
        self.built = True

    def get_config(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self._part_names}
        if any(isinstance(part, keras.Variable) for part in parts.values()):
            raise StepError(
                "HL207: The state of this step has variables of its own, and cannot be saved as a model.",
                fix="Save only the weights: save_weights_only=True.",
            )
        return {"parts": {name: keras.saving.serialize_keras_object(part) for name, part in parts.items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        deserialize = keras.saving.deserialize_keras_object
        return cls({name: deserialize(part, custom_objects) for name, part in config["parts"].items()})


class NullModel:
    """The null object for a plain step without a model."""

    stop_training = False
    optimizer = None

    def _no_weights(self, *_: Any, **__: Any) -> NoReturn:
        raise StepError(
            "HL208: A callback asks for the weights of the model, but hl.fit has no model.",
            fix='Pass what the step trains: hl.fit(..., state={"model": model}).',
        )

    get_weights = set_weights = save_weights = load_weights = save = _no_weights


def _model(found: dict[str, Any]) -> Any:
    models = [leaf for leaf in found.values() if isinstance(leaf, keras.Model)]
    if len(models) == 1:
        return models[0]
    parts = {name: leaf for name, leaf in found.items() if isinstance(leaf, (keras.Layer, keras.Variable))}
    return JointModel(parts) if parts else NullModel()


@contextlib.contextmanager
def _with_optimizer(model: Any, optimizers: dict[str, keras.Optimizer]) -> Iterator[None]:
    """Sets `model.optimizer` for callbacks, and restores the model afterwards."""
    if not optimizers:
        yield
        return
    attributes = vars(model)  # Not by `setattr`: Keras tracks everything that is set on a model.
    before = {"optimizer": attributes["optimizer"]} if "optimizer" in attributes else {}
    attributes["optimizer"] = next(iter(optimizers.values())) if len(optimizers) == 1 else NamedOptimizers(optimizers)
    try:
        yield
    finally:
        del attributes["optimizer"]
        attributes.update(before)


def _name(path: tuple[Any, ...]) -> str:
    """A path in a structure as an identifier: `nets_critic` for `{"nets": {"critic": ...}}`."""
    return "_".join(str(part) if str(part).isidentifier() else f"model_{part}" for part in path) or "model"
