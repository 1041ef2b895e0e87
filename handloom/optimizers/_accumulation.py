"""Updates on every n-th step: from the gradients of all steps, or of that step."""

import functools
from typing import Any

from handloom._keras import Gradients, Tensor, Variable, keras, trained_by
from handloom._trace.loss_weight import SUM, weight_of_step
from handloom._trace.observe import tell
from handloom._util.arguments import whole_number
from handloom.backends import backend
from handloom.errors import ArgumentError
from handloom.optimizers._wrapper import Wrapper

ops = keras.ops


class _EveryNthStep(Wrapper):
    """The base of optimizers that update on every n-th step."""

    options = ("steps",)

    def __init__(self, inner_optimizer: Any, steps: int, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.steps = whole_number(type(self).__name__, steps=steps)


@keras.saving.register_keras_serializable("handloom")
class GradientAccumulation(_EveryNthStep):
    """Accumulates the gradients of several steps into one update, equal to the update of one step on all examples.

    The gradient of a step is weighted by its batch: by the number of examples, or by `hl.minimize(..., weight=)` (the
    number of tokens, for a loss that is a mean over tokens). Schedules, clipping and averaged weights inside count
    updates, and the steps in between do not run them. At the end of an epoch an incomplete window is updated from the
    steps that it has; in a loop by hand, call `flush()`.

    Args:
        inner_optimizer: The optimizer that updates.
        steps: The number of steps per update.
        name: The name of the optimizer.

    Attributes:
        gathered: A variable with the number of steps in the window; exists once the optimizer is built.

    Raises:
        ArgumentError: `steps` is not a positive whole number.
    """

    def __init__(self, inner_optimizer: Any, steps: int, name: str | None = None) -> None:
        super().__init__(inner_optimizer, steps, name)
        self.__dict__["_reached"] = {}  # Not as an attribute: Keras would track the variables in it as slots.

    def add_slots(self, variables: list[Variable]) -> None:
        self._sums = self.add_optimizer_variables(variables, "gradient_sum")
        self._weight = self.add_variable((), name="weight", dtype="float32")
        self.gathered = self.add_variable((), name="gathered", dtype="int32")

    def update(self, gradients: Gradients, variables: list[Variable]) -> None:
        weight = weight_of_step()
        factor = ops.cast(1.0 if weight is SUM else weight, "float32")
        sums = self._sums_by_id()
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None:
                if id(variable) not in sums:
                    raise ArgumentError(f"HL301: Unknown variable: {variable.path}.")  # Keras's own words.
                self._reached[id(variable)] = variable
                total = sums[id(variable)]
                total.assign(total + gradient * ops.cast(factor, total.dtype))
        self._weight.assign(factor if weight is SUM else self._weight + factor)
        self.gathered.assign(self.gathered + 1)
        tell("accumulated", self)
        self._update_if(ops.greater_equal(self.gathered, self.steps))

    def flush(self) -> None:
        """Updates from an incomplete window; does nothing if the window is empty."""
        if self._reached:
            self._update_if(ops.greater(self.gathered, 0))

    @property
    def reached(self) -> tuple[str, ...]:
        """The paths of the variables that have had a gradient so far."""
        return tuple(variable.path for variable in self._reached.values())

    def _update_if(self, due: Tensor) -> None:
        backend.cond(due, self._update_from_window, lambda: None)

    def _update_from_window(self) -> None:
        # Momentum would move a variable that has been frozen since.
        variables = [variable for variable in self._reached.values() if variable.trainable]
        # If all weights in the window are zero, the update is zero.
        weight = ops.where(ops.equal(self._weight, 0), 1.0, self._weight.value)
        sums = self._sums_by_id()
        totals = [sums[id(variable)] for variable in variables]
        super().update([total / ops.cast(weight, total.dtype) for total in totals], variables)
        for kept in [*(sums[key] for key in self._reached), self._weight, self.gathered]:
            kept.assign(ops.zeros_like(kept.value))

    def _sums_by_id(self) -> dict[int, Variable]:
        return dict(zip(map(id, trained_by(self)), self._sums, strict=True))


@keras.saving.register_keras_serializable("handloom")
class UpdateEvery(_EveryNthStep):
    """Updates on every n-th step and discards the gradients of the other steps.

    For networks that train at different rates, such as a generator that is updated once per five steps of its critic.
    (To accumulate the gradients of the other steps, use `GradientAccumulation`.)

    Args:
        inner_optimizer: The optimizer that updates.
        steps: The number of steps per update.
        name: The name of the optimizer.

    Raises:
        ArgumentError: `steps` is not a positive whole number.
    """

    def add_slots(self, variables: list[Variable]) -> None:
        self._calls = self.add_variable((), name="calls", dtype="int32")

    def update(self, gradients: Gradients, variables: list[Variable]) -> None:
        self._calls.assign(self._calls + 1)
        update = functools.partial(super().update, gradients, variables)
        backend.cond(ops.equal(self._calls % self.steps, 0), update, lambda: None)
