"""Steps in Keras's own manner on a backend where they take the state of the model, and return it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from handloom._keras import build_symbolically, keras
from handloom._trace.observe import building

R = TypeVar("R")


def build_all(model: keras.Model, data: Any) -> None:
    """Creates the variables that such steps expect to be there: of the layers, the metrics and the optimizer."""
    with building():
        build_symbolically(model, data)


def also_with_state(step: Callable[[Any, Any], R]) -> Callable[..., R]:
    """A default step which, called with a state, as in `super().train_step(state, data)`, is the one of Keras."""

    @functools.wraps(step)
    def call(self: keras.Model, *arguments: Any) -> Any:
        return (step if len(arguments) == 1 else getattr(keras.Model, step.__name__))(self, *arguments)

    return call
