"""What a callback carries from one hook to the next, taken and given back: for runs that stop and go on."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np

from handloom._keras import keras
from handloom.checkpoint.dtypes import CODES


class Stateful:
    """A callback whose state is a few of its attributes.

    Attributes:
        carries: Their names.
    """

    carries: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """What the callback carries between hooks: plain values and NumPy arrays."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.carries}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Args:
            state: From `state()`. To be given back after `on_train_begin`, which begins anew.
        """
        for name in self.carries:
            setattr(self, name, copy.deepcopy(state[name]))


def callback_state(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """What any callback carries between hooks: one of ours, of Keras's or your own.

    A callback with methods `state` and `restore` says so itself. Of any other these are its attributes that are plain
    values (numbers, strings, `None`, NumPy arrays, lists and dicts of these) and no arguments of its constructor.

    Args:
        callback: The callback.

    Returns:
        Copies of the plain values, by name.
    """
    if _speaks_for_itself(callback):
        return dict(callback.state())
    arguments = _arguments(type(callback))
    return {
        name: copy.deepcopy(value)
        for name, value in vars(callback).items()
        if name not in arguments and name not in ("params", "model", "_model") and _is_plain(value)
    }


def restore_callback(callback: keras.callbacks.Callback, state: dict[str, Any]) -> None:
    """Has a callback go on from where another like it was.

    Args:
        callback: Made with the same arguments. If it is to go on in a new call of `fit`, this comes after its
            `on_train_begin`, with which many callbacks begin anew.
        state: From `callback_state`.
    """
    if _speaks_for_itself(callback):
        callback.restore(state)
        return
    for name, value in state.items():
        setattr(callback, name, copy.deepcopy(value))


def _speaks_for_itself(callback: Any) -> bool:
    return all(callable(getattr(callback, method, None)) for method in ("state", "restore"))


def _arguments(cls: type) -> set[str]:
    """The names of the arguments of a class's constructor, and of those it hands further arguments to."""
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
