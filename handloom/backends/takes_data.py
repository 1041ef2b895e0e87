"""The arguments of a model's step: a batch or, in Keras's own manner on JAX, the state of the model and a batch."""

import inspect
from collections.abc import Callable
from typing import Any

from handloom.errors import StepError


def takes(step: Callable[..., Any], arguments: int) -> bool:
    """Whether a step can be called with so many arguments."""
    try:
        inspect.signature(step).bind(*[None] * arguments)
    except TypeError:
        return False
    return True


def check_takes_data(step: Callable[..., Any], model: str, title: str) -> None:
    """Raises an error if a step cannot be called with a batch.

    Args:
        step: The step.
        model: The class of the model.
        title: The title of the backend.
    """
    if takes(step, 1):
        return
    name = step.__name__
    why, fix = "A step takes one argument, the batch.", f"Write {name}(self, data)."
    if takes(step, 2):
        why = f"It looks like a step for JAX, which takes the state and returns it; Keras runs on {title}."
        fix += " It reads and writes variables directly, on every backend. Or run this one with KERAS_BACKEND=jax."
    raise StepError(f"HL254: {model}.{name}{inspect.signature(step)} cannot be called with one argument.", why, fix)
