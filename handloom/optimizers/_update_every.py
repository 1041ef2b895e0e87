"""Updates on every n-th step only."""

from __future__ import annotations

from typing import Any

from handloom._keras import Tensor, Variable, keras
from handloom.backends import backend
from handloom.optimizers._wrapper import Wrapper, positive_whole

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class UpdateEvery(Wrapper):
    """Makes an update on every n-th step and lets the gradients of the others go.

    For networks that move at different paces, such as a generator once for five steps of its critic. (To gather the
    gradients in between instead, use `GradientAccumulation`.)

    Args:
        inner_optimizer: The optimizer that updates.
        steps: An update is made on every so many-th call.
        name: Name of the optimizer.

    Raises:
        ValueError: If `steps` is not a positive whole number.
    """

    _calls: Variable

    def __init__(self, inner_optimizer: Any, steps: int, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.steps = positive_whole("UpdateEvery", steps=steps)

    def add_slots(self, variables: list[Variable]) -> None:
        del variables  # One counter for all.
        self.keep(_calls=self.add_variable((), name="calls", dtype="int32"))

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        self._calls.assign(self._calls + 1)
        due = ops.equal(self._calls % self.steps, 0)
        backend.cond(due, lambda: self.apply_inner(gradients, variables), lambda: None)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"steps": self.steps}
