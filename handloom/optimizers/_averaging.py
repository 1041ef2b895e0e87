"""Averages of the weights, beside the live weights."""

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

from handloom._keras import Gradients, Variable, keras, trained_by
from handloom._util.arguments import whole_number
from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import ArgumentError, OptimizerError
from handloom.optimizers._accumulation import GradientAccumulation
from handloom.optimizers._tree import inside
from handloom.optimizers._wrapper import Wrapper

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class WeightAveraging(Wrapper):
    """Keeps an average of the weights, which often generalizes better than the last weights.

    With `decay` it is an exponential moving average, `average <- decay * average + (1 - decay) * weights` (Polyak and
    Juditsky, 1992); with `decay=None` it is the plain mean of the weights (Izmailov et al., Stochastic Weight
    Averaging, 2018). The first contribution is the weights themselves, so there is no bias to correct. It counts
    updates, not steps: `GradientAccumulation(WeightAveraging(optimizer), 4)` averages after every fourth step.

    `model.evaluate(..., weights="ema")`, `model.predict(..., weights="ema")` and
    `handloom.optimizers.averaged_weights(model)` use the average; the live weights do not change.

    Args:
        inner_optimizer: The optimizer that updates.
        decay: A number between 0 and 1, or `None`.
        start: The number of updates before the first contribution.
        every: The number of updates from one contribution to the next.
        name: The name of the optimizer.

    Raises:
        ArgumentError: An argument is out of its range, or the inner optimizer accumulates gradients.
    """

    options = ("decay", "start", "every")

    def __init__(
        self,
        inner_optimizer: Any,
        decay: float | None = 0.999,
        *,
        start: int = 0,
        every: int = 1,
        name: str | None = None,
    ) -> None:
        if decay is not None and not (isinstance(decay, numbers.Real) and 0 < decay < 1):
            raise ArgumentError(
                f"HL303: WeightAveraging takes a decay between 0 and 1, or None; received {short(decay)}."
            )
        super().__init__(inner_optimizer, name=name)
        if any(inside(self.inner_optimizer, GradientAccumulation)):
            raise ArgumentError(
                "HL304: WeightAveraging is around GradientAccumulation.",
                "It would miss the update from an incomplete last window.",
                "Put it inside: GradientAccumulation(WeightAveraging(optimizer), steps).",
            )
        self.decay = decay
        self.start = whole_number("WeightAveraging", least=0, start=start)
        self.every = whole_number("WeightAveraging", every=every)

    def add_slots(self, variables: list[Variable]) -> None:
        self._averages = self.add_optimizer_variables(variables, "average")
        self.contributions = self.add_variable((), name="contributions", dtype="int32")
        self._seen = self.add_variable((), name="seen", dtype="int32")

    def update(self, gradients: Gradients, variables: list[Variable]) -> None:
        super().update(gradients, variables)
        updates = ops.cast(self.iterations, "int32")
        due = ops.logical_and(updates >= self.start + 1, ops.equal((updates - self.start - 1) % self.every, 0))
        backend.cond(ops.logical_and(updates > self._seen, due), self._contribute, lambda: None)
        self._seen.assign(updates)

    def _contribute(self) -> None:
        count = ops.cast(self.contributions, "float32")
        share = 1 / (count + 1) if self.decay is None else ops.where(ops.equal(count, 0), 1.0, 1 - self.decay)
        for average, variable in self.pairs():
            average.assign(average + ops.cast(share, average.dtype) * (variable.value - average))
        self.contributions.assign(self.contributions + 1)

    def pairs(self) -> list[tuple[Variable, Variable]]:
        """Pairs (average, variable)."""
        pairs = zip(self._averages, trained_by(self), strict=True)
        return [(average, variable) for average, variable in pairs if average is not None]


@contextlib.contextmanager
def averaged_weights(model: Any) -> Iterator[None]:
    """Sets the averaged weights of a model for a block; afterwards its live weights are bitwise the same as before.

    Args:
        model: A compiled model with a `WeightAveraging` among its optimizers; or such an optimizer.

    Raises:
        OptimizerError: There is no average, or it has no contribution yet.
    """
    pairs = _averages(getattr(model, "optimizer", model))
    live = [ops.copy(variable.value) for _, variable in pairs]
    try:
        for average, variable in pairs:
            variable.assign(average)
        yield
    finally:
        for (_, variable), value in zip(pairs, live, strict=True):
            variable.assign(value)


def _averages(optimizer: Any) -> list[tuple[Variable, Variable]]:
    averaging = list(inside(optimizer, WeightAveraging))
    if not averaging:
        raise OptimizerError(
            "HL305: There are no averaged weights: no optimizer keeps an average.",
            fix="Wrap the optimizer: handloom.optimizers.WeightAveraging(optimizer, decay=0.999).",
        )
    for part in averaging:
        if not part.built or not int(ops.convert_to_numpy(part.contributions.value)):
            raise OptimizerError(f"HL306: {part.name!r} has averaged nothing yet; it begins after update {part.start}.")
    return [pair for part in averaging for pair in part.pairs()]
