"""Sets learning rates by a function of the epoch or the step."""

from collections.abc import Callable, Mapping
from typing import Any

from handloom._keras import keras
from handloom._util.every import Every, every
from handloom._util.short import short
from handloom.callbacks._learning_rates import Rates, takes_rate
from handloom.callbacks._state import Stateful
from handloom.errors import ArgumentError


class LearningRateScheduler(Stateful, keras.callbacks.LearningRateScheduler):
    """Sets the learning rate by a function, before epochs or before steps.

    Differences from `keras.callbacks.LearningRateScheduler`: it can also act before steps; it works with optimizers by
    name, each with its own rate, and with wrapped optimizers; the schedule may return any number, also a tensor; a
    `TypeError` in the schedule is raised (Keras calls it again with the epoch alone).

    The rate at the end of each epoch is reported as `learning_rate`, or `learning_rate_<name>` of optimizers by name.

    Args:
        schedule: Takes the number of the next epoch or step (from 0) and the current rate, or only the number. Returns
            the new rate.
        verbose: 1 to print when it acts.
        every: When to call the schedule: `hl.every(epochs=1)` before each epoch, `hl.every(steps=10)` before steps 0,
            10, 20, ... of the run.
        optimizer: The name of the optimizer to act on, if there are several; by default all.

    Raises:
        ArgumentError: `every` counts seconds, which no run repeats exactly; or the schedule does not return a number.
        OptimizerError: When training begins, if there is no such optimizer, or its rate follows a schedule.

    Example:
        `LearningRateScheduler(lambda step, rate: 0.999 * rate, every=hl.every(steps=1), optimizer="generator")`
    """

    carries = ("step",)
    takes_executions = True  # See `Callbacks.each_step`.

    def __init__(
        self,
        schedule: Callable[..., Any],
        verbose: int = 0,
        every: Every = every(epochs=1),
        optimizer: str | None = None,
    ) -> None:
        super().__init__(schedule, verbose)
        if not isinstance(every, Every) or every.seconds is not None:
            raise ArgumentError(
                f"HL756: every takes hl.every(epochs=...) or hl.every(steps=...); received {short(every)}."
            )
        self.every, self.optimizer = every, optimizer
        self.step = 0
        self._takes_rate = takes_rate(schedule)
        if every.steps is not None:  # Hooks that the run calls at each step only if they are there.
            self.on_train_batch_begin, self.on_train_batch_end = self._before_steps, self._after_steps

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self.step = 0
        self._rates = Rates(self.model, self.optimizer)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self.every.epochs is not None and epoch % self.every.epochs == 0:
            self._set_rates("Epoch", epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            logs.update(self._rates.labelled())

    def _before_steps(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        assert self.every.steps is not None
        if self.step % self.every.steps == 0:
            self._set_rates("Step", self.step)
        self._first = batch

    def _after_steps(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.step += batch + 1 - self._first

    def _set_rates(self, unit: str, number: int) -> None:
        for name, rate in self._rates.items():
            answer = self.schedule(number, rate) if self._takes_rate else self.schedule(number)
            self._rates[name] = new = _number(answer)
            if self.verbose:
                print(f"{unit} {number}: setting the learning rate{name and f' of {name}'} to {new:.4g}")


def _number(answer: Any) -> float:
    try:
        return float(keras.ops.convert_to_numpy(answer))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"HL757: The schedule must return a number; it returned {short(answer)}.") from error
