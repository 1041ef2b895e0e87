"""The state of callbacks between hooks, saved and restored with a run."""

import copy
import inspect
from typing import Any

import numpy as np

from handloom._keras import keras
from handloom.checkpoint.dtypes import CODES


class Stateful:
    """A callback whose state is some of its attributes.

    Attributes:
        carries: The names of these attributes.
    """

    carries: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """The state of the callback between hooks: plain values and NumPy arrays."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.carries}

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from a state.

        Args:
            state: From `state()`. Restore it after `on_train_begin`, which resets the callback.
        """
        for name in self.carries:
            setattr(self, name, copy.deepcopy(state[name]))


def callback_state(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """The state of any callback between hooks, whether of Handloom, of Keras, or your own.

    A callback with methods `state` and `restore` defines its state itself. The state of any other callback is its
    attributes with plain values (numbers, strings, `None`, NumPy arrays, lists and dicts of these), except the
    arguments of its constructor.

    Args:
        callback: The callback.

    Returns:
        Copies of the values, by name.
    """
    if _defines_state(callback):
        return dict(callback.state())
    arguments = _arguments(type(callback))
    return {
        name: copy.deepcopy(value)
        for name, value in vars(callback).items()
        if name not in arguments and name not in ("params", "model", "_model") and _is_plain(value)
    }


def restore_callback(callback: keras.callbacks.Callback, state: dict[str, Any]) -> None:
    """Makes a callback resume from the state of another.

    Args:
        callback: A callback created with the same arguments. In a new call of `fit`, restore it after its
            `on_train_begin`, in which many callbacks reset themselves.
        state: From `callback_state`.
    """
    if _defines_state(callback):
        callback.restore(state)
        return
    for name, value in state.items():
        setattr(callback, name, copy.deepcopy(value))


def _defines_state(callback: Any) -> bool:
    return all(callable(getattr(callback, method, None)) for method in ("state", "restore"))


def _arguments(cls: type) -> set[str]:
    """The names of the arguments of all constructors of a class: some pass arguments on to their base."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name in CODES
    return value is None or isinstance(value, (bool, int, float, str))
