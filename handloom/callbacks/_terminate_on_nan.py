"""Stops training when a reported value is not finite."""

from typing import Any

import numpy as np

from handloom._util.every import Every, every
from handloom._util.findings import warn
from handloom.callbacks._event_reader import Event, EventReader


class TerminateOnNaN(EventReader):
    """Stops training when a reported value is NaN or infinite. A warning names the value and the step, and a remedy.

    It checks the values so far. A mean with one NaN stays NaN to the end of the epoch, so that a check now and then
    finds the same as a check at each step, without waiting for the device each time. Results of validation are checked
    as well.

    It replaces `keras.callbacks.TerminateOnNaN`, which checks only `loss`, at every step.

    Args:
        every: When to check within epochs; it always checks at their ends.
    """

    def __init__(self, every: Every | None = every(steps=100)) -> None:
        super().__init__(every)

    def read(self, event: Event) -> None:
        """Checks the values of an event."""
        wrong = [f"{name} is {_shown(value)}" for name, value in event.values.items() if not _is_finite(value)]
        if wrong and event.kind in ("progress", "epoch") and not self.model.stop_training:
            self.model.stop_training = True
            epoch = event.epoch + (event.kind == "progress")
            warn(
                f"HL702: Training stops in epoch {epoch} after step {event.step}: {', '.join(wrong)}.",
                fix="Try a lower learning rate, or clip gradients: handloom.optimizers.GradientTransforms(optimizer, "
                "[ClipByGlobalNorm(1.0)]). To find the first bad operation, run the step eagerly: "
                "hl.run_eagerly(True).",
            )


def _is_finite(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def _shown(value: Any) -> str:
    array = np.asarray(value)
    if not array.ndim:
        return str(array)
    return f"an array with {int((~np.isfinite(array)).sum())} of {array.size} not finite"
