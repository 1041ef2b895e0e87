"""What every source of batches does."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import optree

from handloom._data.sources.leaves import as_tensor, described
from handloom.distribute._strategy import current
from handloom.errors import DataError

Batch: TypeAlias = Any
"""What one step is given: a tensor, or a tuple, list or dict of them, nested at will."""

Look: TypeAlias = Callable[[Any], None]
"""Is shown a batch before it becomes tensors, and raises an error where it must."""


class Source(abc.ABC):
    """Gives the batches of one pass.

    Attributes:
        name: What to call it in an error.
        length: Batches in a pass, `None` if unknown.
        repeatable: Whether there can be more than one pass.
        seed: Seed of the order.
        transform: Applied to a batch before it becomes tensors.
    """

    name: str
    length: int | None = None
    repeatable = True
    seed = 0
    transform: Callable[[Any], Any] = staticmethod(lambda batch: batch)
    _seen: dict[str, str] | None = None

    @property
    def seekable(self) -> bool:
        """Whether any position is gone back to at once, in the same order each time."""
        return True

    @property
    def whole(self) -> Any:
        """All the data in host memory, if it is there; else `None`."""
        return None

    @abc.abstractmethod
    def batches(self, epoch: int, start: int, look: Look | None = None) -> Iterator[Batch]:
        """The batches of the pass number `epoch`, from number `start` on."""

    def peek(self, epoch: int, look: Look | None = None) -> Batch:
        """The first batch of a pass, which it stays."""
        for batch in self.batches(epoch, 0, look):
            return batch
        raise DataError(f"HL414: The data is empty: {self.name} gave no batch.")

    def state(self) -> Any:
        """Where it stands, if epoch and batch do not say that: JSON and arrays; else `None`."""
        return None

    def restore(self, state: Any, epoch: int, start: int) -> None:  # noqa: B027  Most know it by these numbers.
        """Goes to where it stood after `start` batches of a pass; the next call of `batches` goes on from there."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others, as far as that is known without reading on."""
        known = {"source": self.name, "batches": self.length} | (self._seen or {})
        return {name: value for name, value in known.items() if value is not None}

    def _as_batch(self, batch: Any, look: Look | None) -> Batch:
        """What a source gave, as tensors of the backend."""
        batch = self.transform(tuple(batch) if isinstance(batch, list) else batch)
        if look is not None:
            look(batch)
        paths, leaves, structure = optree.tree_flatten_with_path(batch)
        if self._seen is None:
            self._seen = described(paths, leaves)
        return structure.unflatten([as_tensor(leaf, path) for leaf, path in zip(leaves, paths, strict=True)])


@dataclasses.dataclass(frozen=True)
class Cut:
    """How numbered examples are cut into batches.

    Attributes:
        count: Number of examples.
        batch_size: Examples in a batch.
        shuffle: Whether each epoch has an order of its own.
        drop_remainder: Whether a last batch smaller than the others is left out.
    """

    count: int
    batch_size: int
    shuffle: bool
    drop_remainder: bool

    @property
    def length(self) -> int:
        """Batches in an epoch.

        Raises:
            DataError: If there is none.
        """
        length = self.count // self.batch_size if self.drop_remainder else -(-self.count // self.batch_size)
        if not length:
            raise DataError(
                f"HL415: The data has {self.count} example(s), which makes no full batch of {self.batch_size}. Use a "
                "smaller batch_size, or drop_remainder=False.",
            )
        return length

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[slice | np.ndarray]:
        """The numbers of the examples of each batch that this process reads, from batch number `start` on."""
        order = permutation(seed, epoch, self.count) if self.shuffle else None
        size, shard = self.batch_size, current().shard
        for first in range(start * size, self.length * size, size):
            yield shard(slice(first, first + size) if order is None else order[first : first + size])

    def fingerprint(self) -> dict[str, Any]:
        return {
            "examples": self.count,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_remainder": self.drop_remainder,
        }


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """An order that follows from seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)
