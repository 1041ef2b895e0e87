"""Where a compiled model keeps the loss of an epoch."""

from __future__ import annotations

from typing import Any

from handloom._keras import keras
from handloom._weight import weight_of_step


class LossTracker(keras.metrics.Mean):
    """A mean of the losses of batches that counts each by its examples, unless told otherwise.

    Keras's own steps pass the number of examples as `sample_weight`; steps written after its guides do not.
    """

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        super().update_state(values, weight_of_step() if sample_weight is None else sample_weight)
