"""The base class of sources of batches."""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import optree

from handloom._data.sources.leaves import as_tensor, check_any_held, described
from handloom._trace.left_out import is_words
from handloom.distribute._strategy import current
from handloom.errors import DataError

Batch: TypeAlias = Any
"""The data of one step: a tensor, or a tuple, list or dict of tensors, nested at will."""

BatchCheck: TypeAlias = Callable[[Any], None]
"""Takes a batch before it becomes tensors, and raises an error if something is wrong with it."""


class Source(abc.ABC):
    """Reads the batches of one pass.

    Attributes:
        name: The name of the data in messages.
        length: Batches in a pass, `None` if unknown.
        repeatable: Whether there can be more than one pass.
        whole: All the data as NumPy arrays, if it is in host memory; else `None`.
        seed: Seed of the order.
        transform: Applied to a batch before it becomes tensors.
    """

    name: str
    length: int | None = None
    repeatable = True
    whole: Any = None
    seed = 0
    transform: Callable[[Any], Any] = staticmethod(lambda batch: batch)
    _seen: dict[str, str] | None = None

    @property
    def seekable(self) -> bool:
        """Whether any position is restored at once, with the same order each time."""
        return True

    @abc.abstractmethod
    def batches(self, epoch: int, start: int, check: BatchCheck | None = None) -> Iterator[Batch]:
        """The batches of pass number `epoch`, beginning at batch number `start`."""

    def peek(self, epoch: int, check: BatchCheck | None = None) -> Batch:
        """The first batch of a pass. The pass yields it again."""
        for batch in self.batches(epoch, 0, check):
            return batch
        raise self.empty()

    def is_used_up(self) -> bool:
        """Whether there can be no further batch."""
        return False

    def empty(self) -> DataError:
        """The error for a pass without batches."""
        return DataError(f"HL409: The data is empty: {self.name} gave no batch.")

    def state(self) -> Any:
        """The position, as JSON and arrays, if epoch and batch do not determine it; else `None`."""
        return None

    def restore(self, state: Any, epoch: int, start: int) -> None:  # noqa: B027  For most, these numbers are enough.
        """Restores the position after `start` batches of a pass; the next call of `batches` continues from there."""

    def fingerprint(self) -> dict[str, Any]:
        """Values that identify the data, as far as they are known without reading on."""
        known = {"source": self.name, "batches": self.length} | (self._seen or {})
        return {name: value for name, value in known.items() if value is not None}

    def _as_batch(self, batch: Any, check: BatchCheck | None) -> Batch:
        """Converts a batch of the source to tensors of the backend."""
        batch = self.transform(tuple(batch) if isinstance(batch, list) else batch)
        if check is not None:
            check(batch)
        paths, leaves, structure = optree.tree_flatten_with_path(batch, is_leaf=is_words)
        if self._seen is None:
            self._seen = described(paths, leaves)
        tensors = [as_tensor(leaf, path) for leaf, path in zip(leaves, paths, strict=True)]
        check_any_held(tensors)
        return structure.unflatten(tensors)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How numbered examples are cut into batches.

    Attributes:
        examples: Number of examples.
        batch_size: Examples in a batch.
        shuffle: Whether each epoch has an order of its own.
        drop_remainder: Whether to drop a last batch that is smaller than the others.
    """

    examples: int
    batch_size: int
    shuffle: bool
    drop_remainder: bool

    @property
    def length(self) -> int:
        """Batches in an epoch.

        Raises:
            DataError: There are none.
        """
        if not self.examples:
            raise DataError("HL413: The data is empty: it has 0 examples.")
        length = self.examples // self.batch_size if self.drop_remainder else -(-self.examples // self.batch_size)
        if not length:
            raise DataError(
                f"HL415: The data has {self.examples} example(s), fewer than one full batch of {self.batch_size}.",
                fix="Use a smaller batch_size, or drop_remainder=False.",
            )
        return length

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[slice | np.ndarray]:
        """The numbers of the examples of each batch that this process reads, beginning at batch number `start`."""
        order = permutation(seed, epoch, self.examples) if self.shuffle else None
        size, shard = self.batch_size, current().shard
        for first in range(start * size, self.length * size, size):
            yield shard(slice(first, first + size) if order is None else order[first : first + size])

    fingerprint = dataclasses.asdict


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """An order that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def has(data: Any, *names: str) -> bool:
    """Whether data has all of these attributes."""
    return all(hasattr(data, name) for name in names)
