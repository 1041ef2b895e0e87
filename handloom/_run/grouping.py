"""The batches of an epoch: how many there are, and which of them run in one dispatch.

The groups follow from progress and from what is due, and from nothing else. So a resumed run repeats the grouping of
the run that was stopped, and its results are bitwise identical.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from handloom._data.feed import Batch
from handloom._keras import keras
from handloom._util.every import Every
from handloom._util.findings import warn
from handloom._util.progress import Progress


def limited(batches: Iterable[Batch], steps: int | None) -> Iterator[Batch]:
    """The first `steps` batches, or all for `None`; warns if there are fewer."""
    count = 0
    for batch in islice(batches, steps):
        count += 1
        yield batch
    if steps and count < steps:
        warn(
            f"HL751: The data ran out after {count} of {steps} steps.",
            fix=f"Ask for at most {count} steps. If the data can be read only once, pass a function that returns a new "
            "iterator: it is called for each pass over the data.",
        )


def limited_epochs(epochs: int) -> int:
    """The epochs asked for, or fewer by `keras.config.set_max_epochs`; then it warns."""
    most = keras.config.max_epochs()
    if not most or epochs <= most:
        return epochs
    warn(f"HL760: The run has {most} instead of {epochs} epochs, by keras.config.set_max_epochs or KERAS_MAX_EPOCHS.")
    return int(most)


def limited_steps(steps: int | None, length: int | None) -> int | None:
    """The steps asked for, or fewer by `keras.config.set_max_steps_per_epoch`; then it warns.

    Args:
        steps: As asked for; `None` for all batches.
        length: The number of batches; `None` if unknown.
    """
    most, asked = keras.config.max_steps_per_epoch(), steps or length
    if not most or (asked is not None and asked <= most):
        return steps
    warn(
        f"HL761: A pass has {most} instead of {asked or 'all'} steps, by keras.config.set_max_steps_per_epoch or "
        "KERAS_MAX_STEPS_PER_EPOCH.",
    )
    return int(most)


def grouped(batches: Iterator[Batch], size: int, progress: Progress, due: Sequence[Every]) -> Iterator[list[Batch]]:
    """Batches in groups of `size`; single batches where something is due before that many steps are taken."""
    for batch in batches:
        room = min((schedule.steps_left(progress) for schedule in due), default=size)
        yield [batch, *islice(batches, size - 1)] if room >= size else [batch]
