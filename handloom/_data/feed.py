"""Feeds: any source of batches, with a position.

A source (`_data/sources/`) gives the batches of one pass from a given one on; the feed counts passes and batches.
Batches are one ahead of the device without anybody reading ahead: steps are dispatched, not waited for, so that the
loop asks for the next batch, and has it moved, while the device works on the last. So a position is always that of what
was given, never of what was only read.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from handloom._data.sources import Batch, source_of
from handloom._util.findings import warn
from handloom.errors import ArgumentError, DataError

__all__ = ["Batch", "Feed"]


class Feed:
    """A source of batches that knows its position. Iterating it once is one epoch.

    The next batch is made, and on its way to the device, while that works on the last: a step is dispatched and not
    waited for. Nothing is read ahead for that, so the position is that of the batches given.

    Args:
        data: NumPy, pandas or backend arrays in any nested structure, all of one length along their first axis; a
            Hugging Face `Dataset`, whose batches are dicts of columns; or a source that gives batches already: a
            `tf.data.Dataset`, a torch `DataLoader`, a `keras.utils.PyDataset`, a Grain data set or loader, a Hugging
            Face `IterableDataset`, an iterable, a function that returns an iterator for each epoch, or a generator (for
            one pass). Each of them goes with each backend.
        batch_size: Examples in a batch; for arrays and tables only. 32 by default.
        shuffle: Whether to draw a new order for each epoch; for arrays and tables (by example) and `PyDataset`s (by
            batch). The order is a function of `seed` and the epoch alone.
        seed: Seed of the order; `None` to draw one from Python's random numbers.
        drop_remainder: Whether to leave out a last batch smaller than the others; for arrays and tables only.

    Yields:
        Batches in the structure of the data, as tensors; on JAX host arrays stay NumPy arrays, which compiled
        functions take at no cost. Floating-point numbers of 64 bits become `keras.config.floatx()`; every other dtype
        is kept. JAX makes whole numbers of 64 bits ones of 32, if they all fit.

    Raises:
        DataError: If the data is empty, of unequal lengths, of no known kind, does not go with the options, or, when a
            batch is read, holds what the backend cannot: text and ragged tensors are for TensorFlow alone, sparse
            tensors for TensorFlow and JAX.

    Example:
        `for x, y in hl.Feed((images, labels), batch_size=64, shuffle=True): train_step(x, y)`
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int | None = 0,
        drop_remainder: bool = False,
    ) -> None:
        self._source = source_of(data, batch_size, shuffle, drop_remainder)
        self._source.seed = random.randint(0, 2**31 - 1) if seed is None else seed
        self._any_seed = seed is None
        self._at = _Position()
        self._look: Callable[[Any], None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        at, source = self._at, self._source
        restored, at.restored = at.restored, False
        # A source that can be read once goes on where it stands, unless it is a new one in the place of another.
        given = at.batch if restored or not source.repeatable else 0
        for batch in source.batches(at.epoch, given if restored or source.repeatable else 0, self._look):
            given += 1
            at.batch = given
            yield batch
        self._check_not_empty(given)
        at.epoch, at.batch = at.epoch + 1, 0

    def __len__(self) -> int:
        """Batches in an epoch.

        Raises:
            TypeError: If the source does not know.
        """
        if self.length is None:
            raise ArgumentError(
                f"HL017: A feed over {self._source.name} does not know its length before it has been read."
            )
        return self.length

    def prepare(self, transform: Callable[[Any], Any]) -> None:
        """Has a function applied to each batch that a source gives, before it becomes tensors. Not to arrays."""
        self._source.transform = transform

    def check(self, look: Callable[[Any], None]) -> None:
        """Has a function look at each batch, before it becomes tensors, and raise an error where it must."""
        self._look = look

    def view(self) -> Feed:
        """The same feed, of one position with this one, for checks (see `check`) that this one is not to have."""
        return copy.copy(self)

    @property
    def length(self) -> int | None:
        """Batches in an epoch, `None` if the source does not know."""
        return self._source.length

    def state(self) -> dict[str, Any]:
        """The position, as a checkpoint takes it.

        Returns:
            `epoch`, epochs done; `batch`, batches given of the next; `seed`, that of the order; `data`, by what these
            data are known again: kind and sizes, dtypes and shapes, and of arrays a sample of their values; and for a
            source with a position of its own `source`, which says what that is. All but that are JSON values.
        """
        state = {"epoch": self._at.epoch, "batch": self._at.batch, "seed": self._source.seed}
        position = self._source.state()
        return state | {"data": self._source.fingerprint()} | ({} if position is None else {"source": position})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; the next iteration goes on from there, to the end of that epoch.

        Warns if the data is not what the state is of; see `differences`. Generators that a `DataLoader` draws its order
        from, torch's own among them, are set to where they stood.

        Args:
            state: From `state()` of a feed over the same data with the same options.

        Raises:
            DataError: If it is of another seed, beyond the end, or not a state.
        """
        if not _is_state(state):
            raise DataError(
                f"HL404: A feed's state is a dict of whole numbers epoch, batch and seed; received {state!r}."
            )
        if self._any_seed:
            self._source.seed = state["seed"]
        if state["seed"] != self._source.seed:
            raise DataError(
                f"HL405: The state is of a feed with seed={state['seed']}, this one has seed={self._source.seed}: the "
                f"order of its examples would be another. Make it with seed={state['seed']}.",
            )
        if self.length is not None and state["batch"] > self.length:
            raise DataError(
                f"HL406: The state is at batch {state['batch']}; this feed has {self.length} batches an epoch."
            )
        differences = self.differences(state)
        if differences:
            warn(
                f"HL407: The data is not what it was when its position was saved: {'; '.join(differences)}. It goes on "
                f"after {state['batch']} batches of epoch {state['epoch']} all the same; what it gives may have been "
                "given before.",
            )
        position = state.get("source") if self._is_of_this_source(state) else None
        self._source.restore(position, state["epoch"], state["batch"])
        self._at.epoch, self._at.batch, self._at.restored = state["epoch"], state["batch"], True

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """What keeps this feed from going on exactly where a state of `state()` is.

        Returns:
            A phrase for each difference between these data and those of the state, as far as they are known; none if
            it is the same. A source that has to be read again up to its position is none: see `seekable`.
        """
        then, now = state.get("data", {}), self._source.fingerprint()
        return [_difference(name, then[name], now[name]) for name in then if name in now and then[name] != now[name]]

    @property
    def name(self) -> str:
        """What the data is, in words."""
        return self._source.name

    @property
    def seekable(self) -> bool:
        """Whether any position is gone back to at once, in the same order each time. Else it is read up to there."""
        return self._source.seekable

    @property
    def whole(self) -> Any:
        """All the data, as NumPy arrays in its structure, if it is arrays; else `None`."""
        return self._source.whole

    def peek(self) -> Batch:
        """The first batch of a pass. The pass gives it again."""
        return self._source.peek(self._at.epoch, self._look)

    def stream(self) -> Iterator[Batch]:
        """Pass after pass, without end where the source can be read again."""
        while True:
            yield from self
            if not self._source.repeatable:
                return

    def _is_of_this_source(self, state: Mapping[str, Any]) -> bool:
        return bool(state.get("data", {}).get("source", self.name) == self.name)

    def _check_not_empty(self, given: int) -> None:
        if given:
            return
        if self._at.epoch and not self._source.repeatable:
            raise DataError(
                f"HL408: {self._source.name} is exhausted: it gave its batches in the first epoch. Pass a function "
                "that returns a new generator each time (without calling it), or set steps_per_epoch.",
            )
        raise DataError(f"HL409: The data is empty: {self._source.name} gave no batch.")


@dataclasses.dataclass
class _Position:
    """Where a feed stands.

    Attributes:
        epoch: Epochs done.
        batch: Batches given of the next.
        restored: Whether the next iteration goes on from there, rather than begin the epoch.
    """

    epoch: int = 0
    batch: int = 0
    restored: bool = False


def _is_state(state: Any) -> bool:
    numbers = ("epoch", "batch", "seed")
    if not isinstance(state, Mapping) or not set(numbers) <= set(state) <= {*numbers, "data", "source"}:
        return False
    if not isinstance(state.get("data", {}), Mapping):
        return False
    whole: bool = all(isinstance(state[name], (int, np.integer)) for name in numbers)
    return whole and not any(state[name] < 0 for name in ("epoch", "batch"))


def _difference(name: str, then: Any, now: Any) -> str:
    return f"the {name} are others" if name.startswith("values of ") else f"{name} was {then} and is {now}"
