"""What a saved model names that is not known where it is loaded, said in one sentence.

Keras says it deep inside a copy of the whole config, and of a regularizer not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from handloom._keras import keras
from handloom.errors import SavedModelError


@contextlib.contextmanager
def naming_unknown_parts(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Within, something is made from a config; where that fails for want of classes or functions, they are named.

    Raises:
        SavedModelError: If there are any.
    """
    config = dict(config)  # Keras takes it to pieces.
    try:
        yield
    except (TypeError, ValueError) as error:
        unknown = {} if isinstance(error, SavedModelError) else dict(_unknown(config, custom_objects or {}))
        if not unknown:
            raise
        names = ", ".join(f"{name} (of {module})" for name, module in unknown.items())
        given = ", ".join(f"{name!r}: {name}" for name in unknown)
        raise SavedModelError(
            f"HL603: The saved model has parts that are not known here: {names}. If they are your own, write "
            "@keras.saving.register_keras_serializable() over each of them and import their module before loading, or "
            f"pass them: load_model(..., custom_objects={{{given}}}). If not, do not trust the file.",
        ) from error


def deserialized(config: Mapping[str, Any]) -> Any:
    """What a config describes; see `naming_unknown_parts`."""
    with naming_unknown_parts(config):
        return keras.saving.deserialize_keras_object(config)


def _unknown(config: Any, custom_objects: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and module of each class and function in a config that Keras would not find."""
    if isinstance(config, Mapping):
        if {"class_name", "module", "registered_name"} <= config.keys() and not _is_known(config, custom_objects):
            is_function = config["class_name"] == "function"
            yield str(config["config"] if is_function else config["class_name"]), str(config["module"])
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _unknown(part, custom_objects)


def _is_known(config: Mapping[str, Any], custom_objects: Mapping[str, Any]) -> bool:
    if str(config["module"]).split(".")[0] == "keras":
        return True  # Else it is for Keras to say what is wrong.
    if config["class_name"] == "function":
        return _is_known_function(config, custom_objects)
    return keras.saving.get_registered_object(config["registered_name"], custom_objects) is not None


def _is_known_function(config: Mapping[str, Any], custom_objects: Mapping[str, Any]) -> bool:
    try:
        keras.saving.deserialize_keras_object(config, custom_objects)  # Finds it; calls nothing.
    except (TypeError, ValueError):
        return False
    return True
