"""Stops when what is reported is no number any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from handloom._util.every import Every, every
from handloom._util.findings import warn
from handloom.callbacks._periodic import Periodic


class TerminateOnNaN(Periodic):
    """Stops training when a reported value is NaN or infinite, and warns: which, where, and what to try.

    It looks at the values so far. A mean in which there is one NaN is NaN to the end of the epoch, so that looking now
    and then finds what looking at each step would, without waiting for the device each time. Validation counts too.

    In place of `keras.callbacks.TerminateOnNaN`, which looks at `loss` alone, and at every step.

    Args:
        every: When to look within epochs; at their ends it looks in any case.
    """

    def __init__(self, every: Every = every(steps=100)) -> None:
        super().__init__(every)
        self._stopped = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._stopped = False

    def within_epoch(self, logs: Mapping[str, Any]) -> None:
        self._look(self.progress.epoch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        self._look(epoch, logs or {})

    def _look(self, epoch: int, logs: Mapping[str, Any]) -> None:
        wrong = [f"{name} is {_shown(value)}" for name, value in logs.items() if not _is_finite(value)]
        if not wrong or self._stopped:
            return
        self._stopped = self.model.stop_training = True
        warn(
            "HL708",
            f"Training stops in epoch {epoch} (from 0) after step {self.progress.step}: {', '.join(wrong)}. Try a "
            "lower learning rate, or clip gradients: handloom.optimizers.GradientTransforms(optimizer, "
            "[ClipByGlobalNorm(1.0)]). To find the first bad operation, run the step op by op: hl.run_eagerly(True).",
        )


def _is_finite(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def _shown(value: Any) -> str:
    array = np.asarray(value)
    if not array.ndim:
        return str(array)
    return f"an array with {int((~np.isfinite(array)).sum())} of {array.size} not finite"
