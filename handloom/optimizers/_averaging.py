"""WeightAveraging weights, beside the live ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from handloom._keras import Tensor, Variable, keras, trained_by
from handloom.backends import backend
from handloom.errors import ArgumentError, OptimizerError
from handloom.optimizers._accumulation import GradientAccumulation
from handloom.optimizers._tree import inside
from handloom.optimizers._wrapper import Wrapper, positive_whole

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class WeightAveraging(Wrapper):
    """Keeps an average of the weights, which often generalizes better than the last ones.

    With `decay` an exponential moving average, `average <- decay * average + (1 - decay) * weights` (Polyak and
    Juditsky, 1992); with `decay=None` the plain mean of the weights (Izmailov et al., Stochastic Weight Averaging,
    2018). It begins with the weights themselves, not with zeros, so there is no bias to correct. Counted are updates,
    not steps: `GradientAccumulation(WeightAveraging(optimizer), 4)` averages after every fourth.

    `model.evaluate(..., weights="ema")`, `model.predict(..., weights="ema")` and
    `handloom.optimizers.averaged_weights(model)` use the average; the live weights stay.

    Args:
        inner_optimizer: The optimizer that updates.
        decay: Between 0 and 1, or `None`.
        start: Updates before averaging begins.
        every: Updates between two contributions.
        name: Name of the optimizer.

    Raises:
        ValueError: If an argument is out of its range, or the inner optimizer accumulates.
    """

    contributions: Variable
    _averages: list[Variable]
    _seen: Variable

    def __init__(
        self,
        inner_optimizer: Any,
        decay: float | None = 0.999,
        *,
        start: int = 0,
        every: int = 1,
        name: str | None = None,
    ) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ArgumentError(
                f"HL303: WeightAveraging takes a decay between 0 and 1, or None for the plain mean; received decay={decay!r}.",
            )
        super().__init__(inner_optimizer, name=name)
        if any(isinstance(part, GradientAccumulation) for part in inside(self.inner_optimizer)):
            raise ArgumentError(
                "HL304: WeightAveraging around GradientAccumulation would miss the update of a last, short window; put it "
                "inside: "
                "GradientAccumulation(WeightAveraging(optimizer), steps).",
            )
        self.decay, self.every = decay, positive_whole("WeightAveraging", every=every)
        self.start = positive_whole("WeightAveraging", least=0, start=start)

    def add_slots(self, variables: list[Variable]) -> None:
        self.keep(
            _averages=self.add_optimizer_variables(variables, "average"),
            contributions=self.add_variable((), name="contributions", dtype="int32"),
            _seen=self.add_variable((), name="seen", dtype="int32"),
        )

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        self.apply_inner(gradients, variables)
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

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"decay": self.decay, "start": self.start, "every": self.every}


@contextlib.contextmanager
def averaged_weights(model: Any) -> Iterator[None]:
    """Within, a model has its averaged weights; after, its live ones again, to the bit.

    Args:
        model: A compiled model, one of whose optimizers is `WeightAveraging`; or such an optimizer.

    Raises:
        OptimizerError: If there is no average, or it has no contribution yet.
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
    averaging = [part for part in inside(optimizer) if isinstance(part, WeightAveraging)]
    if not averaging:
        raise OptimizerError(
            "HL305: There are no averaged weights: wrap the optimizer, "
            "handloom.optimizers.WeightAveraging(optimizer, decay=0.999).",
        )
    for part in averaging:
        if not part.built or not int(ops.convert_to_numpy(part.contributions.value)):
            raise OptimizerError(
                f"HL306: {part.name!r} has averaged nothing yet: averaging begins after start={part.start} updates."
            )
    return [pair for part in averaging for pair in part.pairs()]
