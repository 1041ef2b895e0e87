"""Several steps in one dispatch: which go together follows from progress, from what is due, and from nothing else.

So a resumed run repeats the grouping of the run that was stopped, and with it the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from handloom._data.feed import Batch
from handloom._reporting.step import ReportingStep
from handloom._util.every import Every
from handloom._util.progress import Progress


def steps_a_dispatch(asked: int | str, recorded: int | None, *, each_step: bool) -> int:
    """How many steps are dispatched together, at most.

    Args:
        asked: A number, or `"auto"`.
        recorded: What was chosen in the run that is resumed, which `"auto"` takes again; else it is one.
        each_step: Whether a callback needs every step.
    """
    size = (recorded or 1) if asked == "auto" else int(asked)
    return 1 if each_step else size


def grouped(
    batches: Iterator[Batch], size: int, progress: Progress, triggers: Sequence[Every]
) -> Iterator[list[Batch]]:
    """Batches in groups of `size`; by one where something is due before so many steps are taken."""
    for batch in batches:
        room = min((trigger.steps_left(progress) for trigger in triggers), default=size)
        yield [batch, *islice(batches, size - 1)] if room >= size else [batch]


def taking_groups(step: ReportingStep, size: int) -> Callable[[list[Batch]], None]:
    """Takes the steps of a group, in one dispatch if there are `size` of them."""

    def take(group: list[Batch]) -> None:
        if len(group) == size:
            step.take_in_one(group)
            return
        for batch in group:
            step.take(batch)

    return take
