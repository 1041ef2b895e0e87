"""When something happens now and then, as a value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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
        ValueError: Unless exactly one is given, and it is positive (`steps` and `epochs` whole).

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
    name, value = next(iter(chosen.items()))
    _check_interval(name, value)
    return Every(steps=steps, epochs=epochs, seconds=seconds)


def _check_interval(name: str, value: Any) -> None:
    kinds = (int, float) if name == "seconds" else int
    if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
        expected = "a positive number" if name == "seconds" else "a positive whole number"
        raise ArgumentError("HL011", f"hl.every({name}=...) takes {expected}; received {name}={value!r}.")
