"""Fingerprints of settings: they tell models apart that have the same names and shapes."""

import hashlib
import json
from typing import Any

from handloom._keras import keras, layers_of
from handloom.checkpoint.names import keras_objects


def configured(state: Any) -> dict[str, str]:
    """A fingerprint of the settings of each layer and optimizer in a structure, by its name there.

    A layer that holds other layers counts by its class alone: their settings are listed as well. An object without a
    `get_config` is left out.
    """
    kinds = (keras.Layer, keras.optimizers.Optimizer)
    found = {name: _settings(thing) for name, thing in keras_objects(state).items() if isinstance(thing, kinds)}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items() if text}


def _settings(thing: Any) -> str:
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, keras.Layer) and len(list(layers_of(thing))) > 1:
        return kind
    try:
        config = keras.saving.serialize_keras_object(thing.get_config())
        return kind + json.dumps(_lasting(config), sort_keys=True, default=lambda value: type(value).__name__)
    except Exception:  # The user's own `get_config` may fail in any way.
        return ""


def _lasting(config: Any) -> Any:
    """Settings without generated names, learning rates, and the code of lambdas, which has line numbers."""
    if isinstance(config, (list, tuple)):
        return [_lasting(value) for value in config]
    if not isinstance(config, dict) or config.get("class_name") == "DTypePolicy":
        return config
    if config.get("class_name") == "__lambda__":
        return "lambda"
    kept = {key: value for key, value in config.items() if key != "learning_rate" or isinstance(value, dict)}
    return {key: _lasting(value) for key, value in kept.items() if key != "name"}
