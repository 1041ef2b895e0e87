"""The names of checkpoints in a directory, and the rule by which checkpoints are kept."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Self

from handloom._util.short import short
from handloom.errors import ArgumentError

OF_RUN = "checkpoints"  # The directory of checkpoints in a run directory.
_NAME = re.compile("step_([0-9]{9,})(?:_([0-9]{1,9}))?")


@dataclasses.dataclass(frozen=True, order=True)
class Slot:
    """The place of a checkpoint: ordered by its step, then by how often that step had been saved before.

    A step that is saved again gets a new place, as no system call replaces a directory with another atomically.
    """

    step: int
    again: int = 0

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"step_{self.step:09d}" + (f"_{self.again}" if self.again else "")

    @classmethod
    def of(cls, name: str) -> Self | None:
        """The place with that name, or `None` if no place has it."""
        match = _NAME.fullmatch(name)
        slot = cls(int(match[1]), int(match[2] or 0)) if match else None
        return slot if slot and slot.name == name else None


@dataclasses.dataclass(frozen=True)
class Best:
    """The metric by which checkpoints are compared, with sign 1 if less is better and -1 if more is."""

    metric: str
    sign: int

    @classmethod
    def of(cls, words: str) -> Self:
        """Parses `"min:val_loss"` or `"max:accuracy"`.

        Raises:
            ArgumentError: The words are of another form.
        """
        direction, _, metric = str(words).partition(":")
        if direction not in ("min", "max") or not metric:
            raise ArgumentError(f"HL023: best= takes 'min:METRIC' or 'max:METRIC'; received {short(words)}.")
        return cls(metric, 1 if direction == "min" else -1)

    def better(self, metrics: Mapping[str, float], than: Mapping[str, float]) -> bool:
        """Whether metrics are better than others. A finite value is better than a missing or infinite one, or NaN."""
        return self._rank(metrics) < self._rank(than)

    def among(self, metrics: Mapping[Slot, Mapping[str, float]]) -> Slot | None:
        """The best slot; of equals, the earliest step, in the version that was saved last.

        A slot without a finite value of the metric is never the best.
        """
        ranked = [slot for slot, found in metrics.items() if self._rank(found) < math.inf]
        return min(ranked, key=lambda slot: (self._rank(metrics[slot]), slot.step, -slot.again), default=None)

    def _rank(self, metrics: Mapping[str, float]) -> float:
        value = self.sign * metrics.get(self.metric, math.nan)
        return value if math.isfinite(value) else math.inf


def kept(slots: Sequence[Slot], keep: int | None, best: Slot | None) -> set[Slot]:
    """The last `keep` steps (all, if `None`), each in the version that was saved last, and the best.

    The best stays also when its step is saved again, perhaps without the metric, as at the end of a run.
    """
    latest = list({slot.step: slot for slot in sorted(slots)}.values())
    return set(latest if keep is None else latest[-keep:]) | ({best} if best else set())
