"""Stops when it gets no better, and goes back to the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom.callbacks._monitored import Monitored


class EarlyStopping(Monitored, keras.callbacks.EarlyStopping):
    """Stops training when a reported value has got no better for some epochs.

    Keras's own, with these differences: its state can be saved and restored; a NaN is worse than any number (with
    Keras nothing is better than a NaN in the first epoch); epochs that do not report the value, because validation is
    rarer, do not count and do not warn; what improves but never reaches the `baseline` is stopped, as Keras says but
    does not do; a name that ends in `_loss` needs no `mode`, nor does that of a metric of the model's own; in `hl.fit`
    several models are restored together.

    Restored are the weights of the model, all of them, and not the optimizer's variables.

    Args:
        monitor: The value to watch.
        min_delta: What a change must exceed to count as an improvement.
        patience: So many epochs without an improvement stop the training.
        verbose: 1 to print when it acts.
        mode: `"min"`, `"max"`, or `"auto"` to go by the name of the value.
        baseline: A value to be improved upon; until it is, each epoch uses up patience.
        restore_best_weights: Whether the weights of the best epoch are restored at the end.
        start_from_epoch: Epochs at the beginning that do not count.

    Raises:
        ValueError: At the end of the first epoch, if `"auto"` does not know which way is better.
        StepError: In `hl.fit`, if weights are to be restored and `state` names none.
    """

    carries = ("wait", "stopped_epoch", "best", "best_epoch", "best_weights")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.settle_direction()
        super().on_epoch_end(epoch, logs)
        if self.wait >= max(self.patience, 1) and epoch > 0:  # Of a baseline not reached, too.
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def get_monitor_value(self, logs: Mapping[str, Any] | None) -> float | None:
        """The value that is watched, `None` if this epoch has none."""
        return self.watched(logs or {})

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there; to be called after `on_train_begin`."""
        super().restore(state)
        if self.stopped_epoch:
            self.model.stop_training = True
