"""Lowers learning rates when it gets no better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom.callbacks._learning_rates import Rates
from handloom.callbacks._monitored import Monitored


class ReduceLROnPlateau(Monitored, keras.callbacks.ReduceLROnPlateau):
    """Lowers the learning rate when a reported value has got no better for some epochs.

    Keras's own, with these differences: it works with optimizers by name, each by its own rate, and around others;
    its state can be saved and restored; a NaN is worse than any number; what is said of the value at `EarlyStopping`
    holds here.

    The rate of each epoch is reported as `learning_rate`, or `learning_rate_<name>` of optimizers by name.

    Args:
        monitor: The value to watch.
        factor: What the rate is multiplied by; below 1.
        patience: So many epochs without an improvement lower the rate.
        verbose: 1 to print when it acts.
        mode: `"min"`, `"max"`, or `"auto"` to go by the name of the value.
        min_delta: What a change must exceed to count as an improvement.
        cooldown: Epochs after a reduction that do not count.
        min_lr: The rate is not lowered further than this.
        optimizer: Of several optimizers by name, the one whose rate to lower; all by default.

    Raises:
        ValueError: If `factor` is not below 1; at the end of the first epoch, if `"auto"` does not know which way is
            better.
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
        if self.improves(current):
            self.best, self.wait = current, 0
        else:
            self.wait = 0 if self.in_cooldown() else self.wait + 1
            if self.wait >= self.patience and not self.in_cooldown():
                self._reduce(epoch)

    def _reduce(self, epoch: int) -> None:
        for name, rate in self._rates.items():
            # A rate of single precision may stand a little above the minimum that it was set to.
            lower = max(rate * self.factor, self.min_lr)
            if lower < rate and not _same(rate, self.min_lr):
                self._rates[name] = lower
                self.cooldown_counter, self.wait = self.cooldown, 0
                if self.verbose:
                    print(f"Epoch {epoch + 1}: lowering the learning rate{name and f' of {name}'} to {lower:.4g}")


def _same(rate: float, other: float) -> bool:
    return abs(rate - other) <= 1e-6 * other
