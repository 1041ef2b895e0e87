"""Steps in Keras's own manner on JAX: `train_step(self, state, data)` takes the state of a model and returns it."""

from collections.abc import Callable
from typing import Any

from handloom._keras import Tensor, Variable, keras

_ALWAYS = ("trainable_variables", "non_trainable_variables")

STATES = {
    "train_step": (*_ALWAYS, "optimizer_variables", "metrics_variables"),
    "test_step": (*_ALWAYS, "metrics_variables"),
    "predict_step": _ALWAYS,
}
"""The parts of the state that Keras gives to each step."""


def on_variables(model: keras.Model, step: Callable[..., Any], data: Any) -> Any:
    """Runs a step on the present values of the variables, and assigns those that it returns.

    Args:
        model: The model, built.
        step: Takes the state and a batch, returns results and the new state; `predict_step` returns only the second
            part of the state.
        data: The batch.

    Returns:
        The results.
    """
    parts = [_variables(model, part) for part in STATES[step.__name__]]
    state = tuple([variable.value for variable in variables] for variables in parts)
    results, news = step(state, data)
    if step.__name__ == "predict_step":
        parts, state, news = parts[1:], state[1:], (news,)
    for variables, values, new in zip(parts, state, news, strict=True):
        _assign(variables, values, new)
    return results


def _variables(model: keras.Model, part: str) -> list[Variable]:
    if part == "optimizer_variables":
        return [] if model.optimizer is None else list(model.optimizer.variables)
    return list(getattr(model, part))


def _assign(variables: list[Variable], values: list[Tensor], news: list[Tensor]) -> None:
    """Assigns the values that have changed: what a step does not assign need not be copied."""
    for variable, value, new in zip(variables, values, news, strict=True):
        if new is not value:
            variable.assign(new)
