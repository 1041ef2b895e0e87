"""Names the classes and functions of a saved model that are not known where it is loaded.

Keras reports a missing class inside a copy of the whole config, and does not report a missing regularizer at all.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from handloom._keras import keras
from handloom.errors import SavedModelError


@contextlib.contextmanager
def naming_unknown_classes(config: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Replaces an error in the block, which makes an object from a config, by one that names what is not known.

    Raises:
        SavedModelError: The block failed, and the config has classes or functions that are not known.
    """
    config = dict(config)  # Keras takes entries out of it.
    try:
        yield
    except (TypeError, ValueError) as error:
        unknown = {} if isinstance(error, SavedModelError) else dict(_unknown(config, known or {}))
        if not unknown:
            raise
        names = ", ".join(name + f" (of {module})" * (module != "None") for name, module in unknown.items())
        given = ", ".join(f"{name!r}: {name}" for name in unknown)
        raise SavedModelError(
            f"HL603: The saved model uses classes or functions that are not known here: {names}.",
            fix="If they are yours, write @keras.saving.register_keras_serializable() above each of them and import "
            f"their module before loading, or pass them: load_model(..., custom_objects={{{given}}}). If they are not "
            "yours, do not trust the file.",
        ) from error


def _unknown(config: Any, custom_objects: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields name and module of each class and function in a config that Keras would not find."""
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
        return True  # If Keras itself lacks it, Keras's message is the right one.
    if config["class_name"] != "function":
        return keras.saving.get_registered_object(config["registered_name"], custom_objects) is not None
    try:
        keras.saving.deserialize_keras_object(config, custom_objects)  # Finds the function and does not call it.
    except (TypeError, ValueError):
        return False
    return True
