"""Several steps in one dispatch: which steps go together follows from progress and from what is due, and nothing else.

So a run that goes on repeats the grouping of the run that was stopped, and with it the same bits.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from handloom._data.feed import Batch
from handloom._reporting.step import ReportingStep
from handloom._util.every import Every
from handloom._util.progress import Progress
from handloom.errors import ArgumentError


def steps_together(steps_per_execution: int | str, *, each_step: bool) -> int:
    """How many steps are dispatched together, at most.

    Args:
        steps_per_execution: A number, or `"auto"`, which is one.
        each_step: Whether somebody is to be called at each step.

    Raises:
        ValueError: For anything else.
    """
    if steps_per_execution == "auto":
        return 1
    whole = isinstance(steps_per_execution, numbers.Integral) and not isinstance(steps_per_execution, bool)
    if not whole or int(steps_per_execution) < 1:
        raise ArgumentError(
            "HL025", f'steps_per_execution takes a positive whole number or "auto"; received {steps_per_execution!r}.'
        )
    return 1 if each_step else int(steps_per_execution)


def together(
    batches: Iterator[Batch], size: int, progress: Progress, triggers: Sequence[Every]
) -> Iterator[list[Batch]]:
    """Batches in groups of `size`; by one where something is due before so many steps are taken."""
    for batch in batches:
        room = min((trigger.steps_left(progress) for trigger in triggers), default=size)
        yield [batch, *islice(batches, size - 1)] if room >= size else [batch]


def taking_together(step: ReportingStep, size: int) -> Callable[[list[Batch]], None]:
    """Takes the steps of a group, in one dispatch if there are `size` of them."""

    def take(group: list[Batch]) -> None:
        if len(group) == size:
            step.take_in_one(group)
            return
        for batch in group:
            step.take(batch)

    return take
