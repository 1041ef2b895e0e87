"""Early stopping."""

from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom.callbacks._monitored import Monitored


class EarlyStopping(Monitored, keras.callbacks.EarlyStopping):
    """Stops training when a reported value has not improved for some epochs.

    Differences from `keras.callbacks.EarlyStopping`: its state can be saved and restored; a NaN is worse than any
    number (with Keras nothing is better than a NaN in the first epoch); epochs that do not report the value, because
    validation is less frequent, do not count and do not warn; a value that improves but never reaches the `baseline`
    stops the training, as the documentation of Keras says but Keras does not do; a name that ends in `_loss` needs no
    `mode`, nor does the name of a metric of the model; in `hl.fit`, several models are restored together.

    It restores all weights of the model, but not the variables of the optimizer.

    Args:
        monitor: The name of the value to watch.
        min_delta: The change that an improvement must exceed.
        patience: The number of epochs without an improvement after which training stops.
        verbose: 1 to print when it acts.
        mode: `"min"`, `"max"`, or `"auto"` to infer the direction from the name of the value.
        baseline: A value to improve upon; until then, each epoch uses up patience.
        restore_best_weights: Whether to restore the weights of the best epoch at the end.
        start_from_epoch: The number of epochs at the beginning that do not count.

    Raises:
        ArgumentError: At the end of the first epoch, if `"auto"` cannot infer the direction.
        StepError: In `hl.fit`, if weights are to be restored and `state` contains none.
    """

    carries = ("wait", "stopped_epoch", "best", "best_epoch", "best_weights")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.settle_direction()
        super().on_epoch_end(epoch, logs)
        if self.wait >= max(self.patience, 1) and epoch > 0:  # Also if the baseline is not reached.
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def get_monitor_value(self, logs: Mapping[str, Any] | None) -> float | None:
        """The value to watch; `None` if this epoch has none."""
        return self.watched(logs or {})

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from a state; call it after `on_train_begin`."""
        super().restore(state)
        if self.stopped_epoch:
            self.model.stop_training = True
