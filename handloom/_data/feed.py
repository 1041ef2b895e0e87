"""Feeds: any source of batches, with a position.

A source (`_data/sources/`) reads the batches of one pass from a given one on; the feed counts passes and batches.
No thread reads ahead: steps are dispatched, not waited for, so the loop asks for the next batch, and sends it to the
device, while the device works on the last one. The position is therefore always that of the batches yielded, never
that of batches only read.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from handloom._data.position import Position, check_state, differences
from handloom._data.sources import Batch, source_of
from handloom._util.arguments import one_argument_of_data
from handloom._util.findings import warn
from handloom.errors import ArgumentError, DataError

__all__ = ["Batch", "Feed"]


class Feed:
    """A source of batches that knows its position. Iterating it once is one epoch.

    The next batch is read, and sent to the device, while the device works on the last one. The position is that of the
    batches yielded.

    Args:
        data: NumPy, pandas or backend arrays in any nested structure, all of one length along their first axis; a
            Hugging Face `Dataset`, whose batches are dicts of columns; or a source that gives batches already: a
            `tf.data.Dataset`, a torch `DataLoader`, a `keras.utils.PyDataset`, a Grain data set or loader, a Hugging
            Face `IterableDataset`, an iterable, a function that returns an iterator for each epoch, or a generator (for
            one pass). Each works on each backend.
        batch_size: Examples in a batch; for arrays and tables only. 32 by default.
        shuffle: Whether to draw a new order for each epoch; for arrays and tables (by example) and `PyDataset`s (by
            batch). The order depends on `seed` and the epoch alone.
        seed: Seed of the order; `None` to draw one from NumPy's random numbers.
        drop_remainder: Whether to drop a last batch smaller than the others; for arrays and tables only.

    Yields:
        Batches in the structure of the data, as tensors; on JAX host arrays stay NumPy arrays, which compiled
        functions take at no cost. 64-bit floating-point numbers become `keras.config.floatx()`; every other dtype is
        kept, except that JAX makes 64-bit integers 32-bit ones, if they all fit.

    Raises:
        ArgumentError: `batch_size` is not a positive whole number; arrays are passed one by one.
        DataError: The data is empty, of unequal lengths, of an unknown kind, does not go with the options, or holds
            nothing that the backend can. A part that it cannot is left out of the batches, and is an error where a
            step uses it: text and ragged tensors need TensorFlow, sparse tensors TensorFlow or JAX.

    Example:
        `for x, y in hl.Feed((images, labels), batch_size=64, shuffle=True): train_step(x, y)`
    """

    @one_argument_of_data("hl.Feed", "hl.Feed((x, y))")
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
        self._source.seed = int(np.random.randint(2**31 - 1)) if seed is None else seed
        self._any_seed = seed is None
        self._at = Position()
        self._check: Callable[[Any], None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        at, source = self._at, self._source
        restored, at.restored = at.restored, False
        # A source that is read once continues where it is. Batches before it are skipped only after a restore.
        number = at.batch if restored or not source.repeatable else 0
        for batch in source.batches(at.epoch, number if restored or source.repeatable else 0, self._check):
            number += 1
            at.batch = number
            yield batch
        if not number:
            raise self._exhausted() if at.epoch and not source.repeatable else source.empty()
        at.epoch, at.batch = at.epoch + 1, 0

    def __len__(self) -> int:
        """Batches in an epoch.

        Raises:
            TypeError: The length is unknown.
        """
        if self.length is None:
            raise ArgumentError(f"HL017: The length of a feed over {self.name} is unknown before it has been read.")
        return self.length

    def prepare(self, transform: Callable[[Any], Any]) -> None:
        """Applies a function to each batch of a source before it becomes tensors. It does not apply to arrays."""
        self._source.transform = transform

    def check(self, check: Callable[[Any], None]) -> None:
        """Calls a function with each batch before it becomes tensors, to raise an error if something is wrong."""
        self._check = check

    def view(self) -> Self:
        """A feed that shares the position of this one and can have a check of its own (see `check`)."""
        return copy.copy(self)

    @property
    def length(self) -> int | None:
        """Batches in an epoch, `None` if unknown."""
        return self._source.length

    def state(self) -> dict[str, Any]:
        """The position, in the form that a checkpoint takes.

        Returns:
            `epoch`, the number of epochs finished; `batch`, the number of batches yielded in the current one; `seed`,
            the seed of the order; `data`, a fingerprint of the data (its kind, sizes, dtypes and shapes, and for arrays
            a sample of the values); and for a source with a position of its own `source`, that position. All but the
            last are JSON values.
        """
        state = {"epoch": self._at.epoch, "batch": self._at.batch, "seed": self._source.seed}
        position = self._source.state()
        return state | {"data": self._source.fingerprint()} | ({} if position is None else {"source": position})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a position; the next iteration continues from there, to the end of that epoch.

        Warns if the data is not that of the state; see `differences`. Also restores the generators from which a
        `DataLoader` draws its order, including PyTorch's global one.

        Args:
            state: From `state()` of a feed over the same data with the same options.

        Raises:
            DataError: It has another seed, is beyond the end, or is not a state.
        """
        check_state(state, None if self._any_seed else self._source.seed, self.length)
        self._source.seed = state["seed"]
        if changed := self.differences(state):
            warn(
                f"HL407: The data has changed since its position was saved: {'; '.join(changed)}.",
                f"The feed resumes after {state['batch']} batches of epoch {state['epoch'] + 1}, but its next batches "
                "may hold examples that were used before.",
            )
        same_kind = state.get("data", {}).get("source", self.name) == self.name
        self._source.restore(state.get("source") if same_kind else None, state["epoch"], state["batch"])
        self._at.restore(state)

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """Compares the data with that of a state of `state()`, as far as both are known.

        Returns:
            A phrase for each difference; none if the data is the same. It is not a difference that a source must be
            read again up to its position; see `seekable`.
        """
        return differences(state.get("data", {}), self._source.fingerprint())

    @property
    def repeatable(self) -> bool:
        """Whether there can be more than one pass. A generator gives one."""
        return self._source.repeatable

    @property
    def is_used_up(self) -> bool:
        """Whether the data has given batches, can be read only once, and has no more."""
        return bool(self._at.epoch or self._at.batch) and self._source.is_used_up()

    @property
    def name(self) -> str:
        """The kind of data, in words."""
        return self._source.name

    @property
    def seekable(self) -> bool:
        """Whether any position is restored at once, with the same order each time. If not, it is read up to there."""
        return self._source.seekable

    @property
    def whole(self) -> Any:
        """All the data, as NumPy arrays in its structure, if it is arrays; else `None`."""
        return self._source.whole

    def peek(self) -> Batch:
        """The first batch of a pass. The pass yields it again."""
        return self._source.peek(self._at.epoch, self._check)

    def stream(self) -> Iterator[Batch]:
        """Pass after pass: without end, unless the source can be read only once."""
        while True:
            yield from self
            if not self._source.repeatable:
                return

    def _exhausted(self) -> DataError:
        return DataError(
            f"HL408: {self.name} is exhausted: it gave its batches in the first epoch.",
            fix="Pass a function that returns a new generator each time (without calling it), or set steps_per_epoch.",
        )
