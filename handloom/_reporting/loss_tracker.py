"""The metric in which a compiled model keeps the loss of an epoch."""

import contextlib
from collections.abc import Iterator
from typing import Any

from handloom._keras import Tensor, keras
from handloom._trace.loss_weight import weight_of_step


class LossTracker(keras.metrics.Mean):
    """A mean of batch losses, weighted by the examples of each batch unless a weight is given.

    Keras's own steps pass the number of examples as `sample_weight`; steps written after its guides pass none.

    Attributes:
        reported: The result, if no step updates the tracker: the loss reported since the last reset.
    """

    _held: Tensor | None = None
    reported: float | None = None

    def reset_state(self) -> None:
        self.reported = None
        super().reset_state()

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        self.reported = None
        super().update_state(values, weight_of_step() if sample_weight is None else sample_weight)

    def result(self) -> Tensor:
        if self._held is not None:
            return self._held
        return super().result() if self.reported is None else keras.ops.convert_to_tensor(self.reported, self.dtype)


@contextlib.contextmanager
def holding(model: keras.Model, loss: Tensor) -> Iterator[None]:
    """Makes the model's loss tracker return this loss, of one batch, inside the block."""
    trackers = [metric for metric in model.metrics if isinstance(metric, LossTracker)]
    for tracker in trackers:
        tracker._held = loss
    try:
        yield
    finally:
        for tracker in trackers:
            tracker._held = None
