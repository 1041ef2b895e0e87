"""The methods of `hl.Model` that save it and its weights, and load weights."""

import json
from typing import Any

import h5py

from handloom._keras import keras, layers_of, mark_built
from handloom._util.first_few import first_few
from handloom.errors import SavedModelError


def save(self: keras.Model, filepath: Any, *args: Any, **kwargs: Any) -> None:
    """Saves the model, with the arguments of `keras.Model.save`."""
    keras.Model.save(self, filepath, *args, **kwargs)
    if str(filepath).endswith((".h5", ".hdf5")):
        _write_registered_name(self, filepath)


def save_weights(self: keras.Model, filepath: Any, *args: Any, **kwargs: Any) -> None:
    """Saves the weights, with the arguments of `keras.Model.save_weights`.

    Raises:
        SavedModelError: Layers have no weights yet.
    """
    _check_built(self)
    keras.Model.save_weights(self, filepath, *args, **kwargs)


def load_weights(self: keras.Model, filepath: Any, *args: Any, **kwargs: Any) -> None:
    """Loads weights, with the arguments of `keras.Model.load_weights`.

    Raises:
        SavedModelError: Layers have no weights yet.
    """
    _check_built(self)
    keras.Model.load_weights(self, filepath, *args, **kwargs)


def _write_registered_name(model: keras.Model, filepath: Any) -> None:
    """Keras writes the bare name of the class into this format, and would load Keras's own class of that name."""
    name = keras.saving.get_registered_name(type(model))
    if ">" in name:
        with h5py.File(filepath, "r+") as file:
            config = json.loads(file.attrs["model_config"]) | {"class_name": name}
            file.attrs["model_config"] = json.dumps(config).encode()


def _check_built(model: keras.Model) -> None:
    mark_built(model)
    if not model.built:
        names = [layer.name for layer in layers_of(model) if not layer.built and layer is not model] or [model.name]
        raise SavedModelError(
            f"HL604: {type(model).__name__} is not built: it lacks the weights of {first_few(names, 5)}.",
            "A layer creates its weights when it is first called.",
            "Call the model on a batch, or each of these layers on its input, or take one step: "
            "model.train_on_batch(batch).",
        )
