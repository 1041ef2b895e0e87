"""Whether the third part of a batch is known to be sample weights before a step has run."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

from handloom._keras import keras
from handloom._util.codes import codes_of

_UNPACK = keras.utils.unpack_x_y_sample_weight.__name__


def takes_weights(model: keras.Model, name: str, *given: Any) -> bool | None:
    """Whether a step of a model takes the third part of a batch for sample weights; `None` if its run tells.

    It does if the user gave weights. So does the default step, and a step of the user's own that names a variable
    `sample_weight` itself, or calls such a step by `super()`.

    Args:
        model: The model.
        name: The name of the step.
        given: Weights of examples or classes, or `None`.
    """
    if any(weights is not None for weights in given):
        return True
    for number, step in enumerate(_definitions(model, name)):
        names = _names_in(step)
        if step.__module__.startswith("handloom."):
            return True if not number else None
        if "sample_weight" in names and _UNPACK not in names:
            return True
        if name not in names:
            return None
    return None


def _definitions(model: keras.Model, name: str) -> Iterator[types.FunctionType]:
    """The definitions of a method, from the one that runs to that of the last base class."""
    scopes = [vars(model), *map(vars, type(model).__mro__)]
    yield from (_function(scope[name]) for scope in scopes if name in scope)


def _function(method: Any) -> Any:
    """The function in a method, a decorated function, or an `hl.function`."""
    method = getattr(method, "python_function", method)
    return inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else method


def _names_in(function: Any) -> set[str]:
    return {name for code in codes_of(function) for name in (*code.co_names, *code.co_varnames, *code.co_cellvars)}
