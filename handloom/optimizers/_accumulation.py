"""Accumulation that equals the big batch."""

from __future__ import annotations

from typing import Any

from handloom._keras import Tensor, Variable, keras
from handloom._trace.loss_weight import SUM, weight_of_step
from handloom._trace.observe import tell
from handloom.backends import backend
from handloom.errors import ArgumentError
from handloom.optimizers._wrapper import Wrapper, positive_whole

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class GradientAccumulation(Wrapper):
    """Gathers the gradients of several steps into one update, equal to that of one step on all their examples.

    A gradient counts by the weight of its batch: the number of examples, or what `hl.minimize(..., weight=)` says (the
    number of tokens, for a loss that is a mean over tokens). Schedules, clipping and averaged weights inside see whole
    updates only, and the steps in between compute none. A window that is still open at the end of an epoch is updated
    from what it holds; in a loop of your own, call `flush()`.

    Args:
        inner_optimizer: The optimizer that updates.
        steps: Steps to an update.
        name: Name of the optimizer.

    Raises:
        ValueError: If `steps` is not a positive whole number.
    """

    gathered: Variable
    _sums: list[Variable]
    _places: dict[int, int]
    _weight: Variable
    _reached: dict[int, Variable]

    def __init__(self, inner_optimizer: Any, steps: int, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.steps = positive_whole("GradientAccumulation", steps=steps)
        self.keep(_reached={})

    def add_slots(self, variables: list[Variable]) -> None:
        self.keep(
            _sums=self.add_optimizer_variables(variables, "gradient_sum"),
            _places={id(variable): place for place, variable in enumerate(variables)},
            _weight=self.add_variable((), name="weight", dtype="float32"),
            gathered=self.add_variable((), name="gathered", dtype="int32"),
        )

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        weight = weight_of_step()
        factor = ops.cast(1.0 if weight is SUM else weight, "float32")
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None:
                self._reached[id(variable)] = variable
                total = self._sum_of(variable)
                total.assign(total + gradient * ops.cast(factor, total.dtype))
        self._weight.assign(factor if weight is SUM else self._weight + factor)
        self.gathered.assign(self.gathered + 1)
        tell("accumulated", self)
        backend.cond(ops.greater_equal(self.gathered, self.steps), self._make_update, _nothing)

    def flush(self) -> None:
        """Makes the update of a window that is still open; does nothing where none is."""
        if self._reached:
            backend.cond(ops.greater(self.gathered, 0), self._make_update, _nothing)

    @property
    def reached(self) -> tuple[str, ...]:
        """The paths of the variables that have had a gradient so far."""
        return tuple(variable.path for variable in self._reached.values())

    def _make_update(self) -> None:
        # What was frozen since then would be moved by its momentum.
        variables = [variable for variable in self._reached.values() if variable.trainable]
        # A window of examples that all weigh nothing asks for no change.
        weight = ops.where(ops.equal(self._weight, 0), 1.0, self._weight.value)
        sums = [self._sum_of(variable) for variable in variables]
        self.apply_inner([total / ops.cast(weight, total.dtype) for total in sums], variables)
        for kept in [*map(self._sum_of, self._reached.values()), self._weight, self.gathered]:
            kept.assign(ops.zeros_like(kept.value))

    def _sum_of(self, variable: Variable) -> Variable:
        if id(variable) not in self._places:
            raise ArgumentError(f"HL301: Unknown variable: {variable.path}.")  # As Keras's own optimizers say it.
        return self._sums[self._places[id(variable)]]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"steps": self.steps}


def _nothing() -> None:
    pass
