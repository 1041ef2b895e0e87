"""When something happens now and then, as a value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from handloom._util.arguments import positive_number, whole_number
from handloom._util.progress import Progress
from handloom.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Every:
    """A point in training that comes back: made by `hl.every`, asked with `due`.

    Exactly one of the three is set.

    Attributes:
        steps: Number of steps between two occurrences, counted over the whole run.
        epochs: Number of epochs between two occurrences; it is due at the end of an epoch.
        seconds: Seconds of wall-clock time between two occurrences.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def due(self, progress: Progress, seconds_since: float = 0.0) -> bool:
        """Whether now, right after a step or the end of an epoch, is one of its times.

        Args:
            progress: Where training stands. `progress.batch` is 0 at the end of an epoch.
            seconds_since: Seconds since it last happened; only `seconds` looks at it.
        """
        at_end_of_epoch = progress.batch == 0
        if self.epochs is not None:
            return at_end_of_epoch and progress.epoch > 0 and progress.epoch % self.epochs == 0
        if at_end_of_epoch:  # The step before it has been asked about already.
            return False
        if self.steps is not None:
            return progress.step % self.steps == 0
        return seconds_since >= (self.seconds or 0.0)

    @property
    def is_within_epochs(self) -> bool:
        """Whether it may be due between two steps of an epoch."""
        return self.epochs is None

    def steps_left(self, progress: Progress) -> float:
        """How many steps may be taken before it is due within an epoch; infinity if that is not known in steps."""
        return math.inf if self.steps is None else self.steps - progress.step % self.steps


def every(*, steps: int | None = None, epochs: int | None = None, seconds: float | None = None) -> Every:
    """Says when something is to happen, wherever something happens now and then.

    Args:
        steps: Every so many steps (calls of the training step).
        epochs: Every so many epochs, at their end.
        seconds: Every so many seconds.

    Returns:
        An `Every`, a plain value that may be compared, printed and shared.

    Raises:
        ArgumentError: Unless exactly one is given, and it is positive (`steps` and `epochs` whole).

    Example:
        `hl.fit(step, data, validate=(test_step, held_out), validate_every=hl.every(steps=500))`
    """
    given = {"steps": steps, "epochs": epochs, "seconds": seconds}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ArgumentError(
            "HL010",
            f"hl.every() takes exactly one of steps=, epochs= and seconds=; received {chosen or 'none'}. "
            "For example: hl.every(epochs=1).",
        )
    if seconds is not None:
        positive_number("hl.every", seconds=seconds)
    elif steps is not None:
        whole_number("hl.every", steps=steps)
    else:
        whole_number("hl.every", epochs=epochs)
    return Every(steps=steps, epochs=epochs, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class AfterEpochs:
    """The ends of some epochs, by their numbers, counted from 1; asked as an `Every` is."""

    epochs: frozenset[int]
    is_within_epochs = False

    def due(self, progress: Progress, seconds_since: float = 0.0) -> bool:
        """Whether now is one of them."""
        del seconds_since
        return progress.batch == 0 and progress.epoch in self.epochs


def check_every(every: Any, name: str, such_as: str) -> None:
    """Checks an argument that says when.

    Raises:
        ArgumentError: If it does not.
    """
    if not isinstance(every, Every):
        raise ArgumentError("HL008", f"{name} takes {such_as}; received {every!r}.")
