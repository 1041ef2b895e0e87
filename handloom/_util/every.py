"""`hl.every`: a schedule as a value."""

import dataclasses
import math
from typing import Any

from handloom._util.arguments import positive_number, whole_number
from handloom._util.progress import Progress
from handloom._util.short import short
from handloom.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Every:
    """A schedule, made by `hl.every`. Exactly one of its attributes is set.

    Attributes:
        steps: Steps between two events, counted over the whole run.
        epochs: Epochs between two events, which happen at the end of an epoch.
        seconds: Seconds of wall-clock time between two events.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def due(self, progress: Progress, seconds_since: float = 0.0) -> bool:
        """Whether the event is due now, directly after a step or at the end of an epoch.

        Args:
            progress: The progress of training. `progress.batch` is 0 at the end of an epoch.
            seconds_since: Seconds since the last event. Only `seconds` uses it.
        """
        at_end_of_epoch = progress.batch == 0
        if self.epochs is not None:
            return at_end_of_epoch and progress.epoch > 0 and progress.epoch % self.epochs == 0
        if at_end_of_epoch:  # The last step of the epoch was asked about already.
            return False
        if self.steps is not None:
            return progress.step % self.steps == 0
        return seconds_since >= (self.seconds or 0.0)

    @property
    def is_within_epochs(self) -> bool:
        """Whether the event can be due between two steps of an epoch."""
        return self.epochs is None

    def steps_left(self, progress: Progress) -> float:
        """Steps until the event is due within an epoch; infinity if it is not counted in steps."""
        return math.inf if self.steps is None else self.steps - progress.step % self.steps


def every(*, steps: int | None = None, epochs: int | None = None, seconds: float | None = None) -> Every:
    """Makes a schedule: when to validate, save, log and so on. Give exactly one argument.

    Args:
        steps: Number of steps (calls of the training step) between two events.
        epochs: Number of epochs between two events, which happen at the end of an epoch.
        seconds: Number of seconds between two events.

    Returns:
        An `Every`, a value that can be compared, printed and shared.

    Raises:
        ArgumentError: No argument or several are given, or the number is not positive (for `steps` and `epochs`, also
            if it is not whole).

    Example:
        `hl.fit(step, data, validate=(test_step, held_out), validate_every=hl.every(steps=500))`
    """
    given = {"steps": steps, "epochs": epochs, "seconds": seconds}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ArgumentError(
            f"HL010: hl.every() takes exactly one of steps=, epochs= and seconds=; received {chosen or 'none'}.",
            fix="For example: hl.every(epochs=1).",
        )
    check = whole_number if seconds is None else positive_number
    check("hl.every", **chosen)
    return Every(steps=steps, epochs=epochs, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class AfterEpochs:
    """A schedule of the ends of given epochs, counted from 1; it is due like `Every`."""

    epochs: frozenset[int]

    def due(self, progress: Progress, seconds_since: float = 0.0) -> bool:
        """Whether one of these epochs ends now."""
        return progress.batch == 0 and progress.epoch in self.epochs


def check_every(every: Any, name: str, such_as: str) -> None:
    """Checks an argument that must be a schedule.

    Raises:
        ArgumentError: It is something else.
    """
    if not isinstance(every, Every):
        number = every if isinstance(every, int) and every > 1 else 1
        raise ArgumentError(
            f"HL008: {name} takes {such_as}; received {short(every)}.",
            fix=f"Pass {name}=hl.every(steps={number}) or {name}=hl.every(epochs={number}).",
        )
