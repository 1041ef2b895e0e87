"""Lowers learning rates when a value stops improving."""

from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom.callbacks._learning_rates import Rates
from handloom.callbacks._monitored import Monitored


class ReduceLROnPlateau(Monitored, keras.callbacks.ReduceLROnPlateau):
    """Lowers the learning rate when a reported value has not improved for some epochs.

    Differences from `keras.callbacks.ReduceLROnPlateau`: it works with optimizers by name, each with its own rate, and
    with wrapped optimizers; its state can be saved and restored; a NaN is worse than any number; a value that is
    missing, or whose name tells the direction, is treated as by `EarlyStopping`.

    The rate of each epoch is reported as `learning_rate`, or `learning_rate_<name>` of optimizers by name.

    Args:
        monitor: The name of the value to watch.
        factor: The factor that lowers the rate; below 1.
        patience: The number of epochs without an improvement after which the rate is lowered.
        verbose: 1 to print when it acts.
        mode: `"min"`, `"max"`, or `"auto"` to infer the direction from the name of the value.
        min_delta: The change that an improvement must exceed.
        cooldown: The number of epochs after a reduction that do not count.
        min_lr: The lower limit of the rate.
        optimizer: The name of the optimizer to act on, if there are several; by default all.

    Raises:
        ValueError: `factor` is not below 1.
        ArgumentError: At the end of the first epoch, if `"auto"` cannot infer the direction.
        OptimizerError: When training begins, if there is no such optimizer, or its rate follows a schedule.
    """

    carries = ("best", "wait", "cooldown_counter")
    cooldown_counter: int

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
        optimizer: str | None = None,
    ) -> None:
        super().__init__(monitor, factor, patience, verbose, mode, min_delta, cooldown, min_lr)
        self.optimizer = optimizer

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._rates = Rates(self.model, self.optimizer)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        self.settle_direction()
        current = self.watched(logs)
        logs.update(self._rates.labelled())
        if current is None:
            return
        self.cooldown_counter = max(self.cooldown_counter - 1, 0)
        if self.best is None or self.monitor_op(current - self.min_delta, self.best):
            self.best, self.wait = current, 0
        else:
            self.wait = 0 if self.in_cooldown() else self.wait + 1
            if self.wait >= self.patience and not self.in_cooldown():
                self._reduce(epoch)

    def _reduce(self, epoch: int) -> None:
        for name, rate in self._rates.items():
            lower = max(rate * self.factor, self.min_lr)
            # In single precision, a rate may be a little above the limit that it was set to.
            if lower < rate and rate - self.min_lr > 1e-6 * self.min_lr:
                self._rates[name] = lower
                self.cooldown_counter, self.wait = self.cooldown, 0
                if self.verbose:
                    print(f"Epoch {epoch + 1}: lowering the learning rate{name and f' of {name}'} to {lower:.4g}")
