"""Which checkpoints there are, and which are kept."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from handloom.errors import ArgumentError

OF_RUN = "checkpoints"  # Where they are in a run's directory.
_NAME = re.compile("step_([0-9]{9,18})(?:_([0-9]{1,9}))?")


@dataclasses.dataclass(frozen=True, order=True)
class Slot:
    """A checkpoint's place: ordered by its step, then by how often that step had been saved before.

    A step that is saved again gets a new place, as no system call puts one directory in the place of another at once.
    """

    step: int
    again: int = 0

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"step_{self.step:09d}" + (f"_{self.again}" if self.again else "")

    @classmethod
    def of(cls, name: str) -> Slot | None:
        """The place with that name, if it is such a name."""
        match = _NAME.fullmatch(name)
        slot = cls(int(match[1]), int(match[2] or 0)) if match else None
        return slot if slot and slot.name == name else None


@dataclasses.dataclass(frozen=True)
class Best:
    """Which of two checkpoints is better: by a metric, the less or the more of it."""

    metric: str
    sign: int

    @classmethod
    def of(cls, words: str) -> Best:
        """From `"min:val_loss"` or `"max:accuracy"`.

        Raises:
            ValueError: Other words.
        """
        direction, colon, metric = str(words).partition(":")
        if direction not in ("min", "max") or not colon or not metric:
            raise ArgumentError(
                f"HL023: best= takes 'min:METRIC' or 'max:METRIC', as in 'min:val_loss'; received {words!r}."
            )
        return cls(metric, 1 if direction == "min" else -1)

    def better(self, metrics: Mapping[str, float], than: Mapping[str, float]) -> bool:
        """Whether metrics are better than others; they are if these have no finite value."""
        value, other = (self.sign * found.get(self.metric, math.nan) for found in (metrics, than))
        return math.isfinite(value) and not other <= value

    def among(self, metrics: Mapping[Slot, Mapping[str, float]]) -> Slot | None:
        """The best one; of equals the earliest step, as it was saved last.

        One whose metric is missing or not finite cannot be it.
        """
        values = {slot: self.sign * found.get(self.metric, math.nan) for slot, found in metrics.items()}
        candidates = [slot for slot in values if math.isfinite(values[slot])]
        return min(candidates, key=lambda slot: (values[slot], slot.step, -slot.again), default=None)


def kept(slots: Sequence[Slot], keep: int | None, best: Slot | None) -> set[Slot]:
    """The last `keep` steps (all, if `None`), each as it was saved last, and the best.

    The best stays too when its step is saved again, perhaps without the metric, as at the end of a run.
    """
    latest = {slot.step: slot for slot in sorted(slots)}
    last = list(latest.values()) if keep is None else list(latest.values())[-keep:]
    return set(last) | ({best} if best else set())
