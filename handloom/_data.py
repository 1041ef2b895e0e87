"""Feeds: any source of batches, with a position.

A source knows how to give the batches of one pass from a given one on; the feed counts passes and batches. Batches
reach the device by `backend.to_tensor`; as steps are dispatched without waiting for them, the next batch is made
and moved while the device still works on the last.
"""

from __future__ import annotations

import abc
import collections
import itertools
import numbers
import random
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeAlias

import numpy as np
import optree

from handloom._keras import keras
from handloom.backends import backend
from handloom.errors import DataError

Batch: TypeAlias = Any
"""What one step is given: a tensor, or a tuple, list or dict of them, nested at will."""

_DEFAULT_BATCH_SIZE = 32


class Feed:
    """A source of batches that knows its position. Iterating it once is one epoch.

    Args:
        data: NumPy, pandas or backend arrays in any nested structure, all of one length along their first axis; or a
            source that gives batches already: a `tf.data.Dataset`, a torch `DataLoader`, a `keras.utils.PyDataset`,
            an iterable, a function that returns an iterator for each epoch, or a generator (for one pass).
        batch_size: Examples in a batch; for arrays only. 32 by default.
        shuffle: Whether to draw a new order for each epoch; for arrays (by example) and `PyDataset`s (by batch). The
            order is a function of `seed` and the epoch alone.
        seed: Seed of the order; `None` to draw one from Python's random numbers.
        drop_remainder: Whether to leave out a last batch smaller than the others; for arrays only.

    Yields:
        Batches in the structure of the data, as tensors; on JAX host arrays stay NumPy arrays, which compiled
        functions take at no cost. 64-bit floats become `keras.config.floatx()`; other dtypes are kept.

    Raises:
        DataError: If the data is empty, of unequal lengths, of no known kind, or does not go with the options.

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
        self._source = _source(data, batch_size, shuffle, drop_remainder)
        self._epoch = 0
        self._batch = 0
        self._restored = False
        self._any_seed = seed is None
        self._seed = self._source.seed = random.randint(0, 2**31 - 1) if seed is None else seed

    def __iter__(self) -> Iterator[Batch]:
        restored, self._restored = self._restored, False
        # A source that can be read once goes on where it stands, unless it is a new one in the place of another.
        given = self._batch if restored or not self._source.repeatable else 0
        for batch in self._source.batches(self._epoch, given if restored or self._source.repeatable else 0):
            given += 1
            self._batch = given
            yield batch
        self._check_not_empty(given)
        self._epoch, self._batch = self._epoch + 1, 0

    def __len__(self) -> int:
        """Batches in an epoch.

        Raises:
            TypeError: If the source does not know.
        """
        if self.length is None:
            raise TypeError(f"A feed over {self._source.name} does not know its length before it has been read.")
        return self.length

    def prepare(self, transform: Callable[[Any], Any]) -> None:
        """Has a function applied to each batch that a source gives, before it becomes tensors. Not to arrays."""
        self._source.transform = transform

    def check(self, look: Callable[[Any], None]) -> None:
        """Has a function look at each batch, before it becomes tensors, and raise an error where it must."""
        self._source.look = look

    @property
    def length(self) -> int | None:
        """Batches in an epoch, `None` if the source does not know."""
        return self._source.length

    def state(self) -> dict[str, int]:
        """The position, as plain numbers: epochs done, batches given of the next, and the seed of the order."""
        return {"epoch": self._epoch, "batch": self._batch, "seed": self._seed}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to a position; the next iteration goes on from there, to the end of that epoch.

        Args:
            state: From `state()` of a feed over the same data with the same options.

        Raises:
            DataError: If it is of another seed, beyond the end, or not a state.
        """
        if not _is_state(state):
            raise DataError(f"A feed's state is a dict of whole numbers epoch, batch and seed; received {state!r}.")
        if self._any_seed:
            self._seed = self._source.seed = state["seed"]
        if state["seed"] != self._seed:
            raise DataError(
                f"The state is of a feed with seed={state['seed']}, this one has seed={self._seed}: the order of its "
                f"examples would be another. Make it with seed={state['seed']}."
            )
        if self.length is not None and state["batch"] > self.length:
            raise DataError(f"The state is at batch {state['batch']}; this feed has {self.length} batches an epoch.")
        self._epoch, self._batch, self._restored = state["epoch"], state["batch"], True

    @property
    def name(self) -> str:
        """What the data is, in words."""
        return self._source.name

    @property
    def seekable(self) -> bool:
        """Whether any position is reached at once, in the same order each time. Else it is read up to there."""
        return self._source.seekable

    def peek(self) -> Batch:
        """The first batch of a pass. A source that can be read only once gives it again."""
        return self._source.peek()

    def stream(self) -> Iterator[Batch]:
        """Pass after pass, without end where the source can be read again."""
        while True:
            yield from self
            if not self._source.repeatable:
                return

    def _check_not_empty(self, given: int) -> None:
        if given:
            return
        if self._epoch and not self._source.repeatable:
            raise DataError(
                f"{self._source.name} is exhausted: it gave its batches in the first epoch. Pass a function that "
                "returns a new generator each time (without calling it), or set steps_per_epoch."
            )
        raise DataError(f"The data is empty: {self._source.name} gave no batch.")


class _Source(abc.ABC):
    """Gives the batches of one pass.

    Attributes:
        name: What to call it in an error.
        length: Batches in a pass, `None` if unknown.
        repeatable: Whether there can be more than one pass.
        seekable: Whether any position is reached at once, in the same order each time.
        seed: Seed of the order.
        transform: Applied to a batch before it becomes tensors.
        look: Shown each batch then.
    """

    name: str
    length: int | None = None
    repeatable = True
    seekable = False
    seed = 0
    transform: Callable[[Any], Any] = staticmethod(lambda batch: batch)
    look: Callable[[Any], None] | None = None

    @abc.abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of the pass number `epoch`, from number `start` on."""

    def peek(self) -> Batch:
        """The first batch of a pass, which it stays."""
        for batch in self.batches(0, 0):
            return batch
        raise DataError(f"The data is empty: {self.name} gave no batch.")

    def _as_batch(self, batch: Any) -> Batch:
        """What a source gave, as tensors of the backend."""
        batch = self.transform(tuple(batch) if isinstance(batch, list) else batch)
        if self.look is not None:
            self.look(batch)
        leaves, structure = optree.tree_flatten(batch)
        return structure.unflatten([_as_tensor(leaf) for leaf in leaves])


class _Arrays(_Source):
    """Arrays, sliced. Any position is reached at once."""

    name = "arrays"
    seekable = True

    def __init__(self, data: Any, batch_size: int, shuffle: bool, drop_remainder: bool) -> None:
        paths, leaves, self._structure = optree.tree_flatten_with_path(data)
        self._arrays = [_host_array(leaf, path) for path, leaf in zip(paths, leaves, strict=True)]
        self._count = _common_length(self._arrays, paths)
        samples = [array[:1] for array in self._arrays]
        self._as_they_are = all(backend.to_tensor(sample) is sample for sample in samples)
        self._batch_size, self._shuffle = batch_size, shuffle
        self.length = self._count // batch_size if drop_remainder else -(-self._count // batch_size)
        if not self.length:
            raise DataError(
                f"The data has {self._count} example(s), which makes no full batch of {batch_size}. Use a smaller "
                "batch_size, or drop_remainder=False."
            )

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self._count) if self._shuffle else None
        size, arrays, unflatten = self._batch_size, self._arrays, self._structure.unflatten
        for first in range(start * size, (self.length or 0) * size, size):
            chosen: Any = slice(first, first + size) if order is None else order[first : first + size]
            leaves = [array[chosen] for array in arrays]
            if self.look is not None:
                self.look(unflatten(leaves))
            yield unflatten(leaves if self._as_they_are else map(backend.to_tensor, leaves))


class _Batches(_Source):
    """Anything that gives batches when it is iterated. A position is reached by reading up to it."""

    def __init__(self, name: str, iterate: Callable[[], Iterable[Any]], length: int | None, repeatable: bool) -> None:
        self.name, self._iterate, self.length, self.repeatable = name, iterate, length, repeatable

    def peek(self) -> Batch:
        if self.repeatable:
            return super().peek()
        given = iter(self._iterate())
        first = list(itertools.islice(given, 1))
        again = itertools.chain(first, given)
        self._iterate = lambda: again
        return super().peek() if not first else self._as_batch(first[0])

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        del epoch  # Such a source decides by itself on its order.
        return map(self._as_batch, itertools.islice(iter(self._iterate()), start, None))


class _PyDataset(_Source):
    """A `keras.utils.PyDataset`, by index, with its workers."""

    name = "the PyDataset"
    seekable = True

    def __init__(self, data: keras.utils.PyDataset, shuffle: bool) -> None:
        self._data, self._shuffle = data, shuffle
        self.length = data.num_batches
        if self.length == 0:
            raise DataError("The data is empty: the PyDataset has length 0.")

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self._data.on_epoch_begin()
        yield from map(self._as_batch, self._read(self._indices(epoch, start)))
        self._data.on_epoch_end()

    def _indices(self, epoch: int, start: int) -> Iterable[int]:
        if self.length is None:
            return itertools.count(start)
        if self._shuffle:
            return map(int, np.random.default_rng([self.seed, epoch]).permutation(self.length)[start:])
        return range(start, self.length)

    def _read(self, indices: Iterable[int]) -> Iterator[Any]:
        data = self._data
        if data.use_multiprocessing:
            # Spawned: a forked child of a process that runs a backend's threads may hang.
            pool = ProcessPoolExecutor(data.workers, get_context("spawn"), _keep_in_worker, (data,))
            return _read_ahead(pool, _read_in_worker, indices, data.max_queue_size)
        if data.workers > 1:
            return _read_ahead(ThreadPoolExecutor(data.workers), data.__getitem__, indices, data.max_queue_size)
        return map(data.__getitem__, indices)


_in_worker: list[keras.utils.PyDataset] = []


def _keep_in_worker(data: keras.utils.PyDataset) -> None:
    _in_worker[:] = [data]


def _read_in_worker(index: int) -> Any:
    return _in_worker[0][index]


def _read_ahead(pool: Executor, read: Callable[[int], Any], indices: Iterable[int], size: int) -> Iterator[Any]:
    """Results of `read` in order, up to `size` of them under way at a time."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    try:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) >= max(size, 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _source(data: Any, batch_size: int | None, shuffle: bool, drop_remainder: bool) -> _Source:
    whole = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if batch_size is not None and not (whole and batch_size > 0):
        raise DataError(f"batch_size takes a positive whole number; received {batch_size!r}.")
    if is_arrays(data):
        return _Arrays(data, batch_size or _DEFAULT_BATCH_SIZE, shuffle, drop_remainder)
    source = _batched_source(data, shuffle)
    refused = {"batch_size": batch_size is not None, "drop_remainder": drop_remainder}
    refused["shuffle"] = shuffle and not isinstance(source, _PyDataset)
    for option, given in refused.items():
        if given:
            raise DataError(f"{option} is for arrays; {source.name} gives batches already. Set it where they are made.")
    return source


def _batched_source(data: Any, shuffle: bool) -> _Source:
    if isinstance(data, keras.utils.PyDataset):
        return _PyDataset(data, shuffle)
    if isinstance(data, Iterator):
        kind = "the generator" if isinstance(data, types.GeneratorType) else f"the {type(data).__name__}"
        return _Batches(kind, lambda: data, None, repeatable=False)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, list, tuple, dict)):
        return _Batches(f"the {type(data).__name__}", lambda: data, _length(data), repeatable=True)
    if callable(data) and not isinstance(data, keras.Layer):
        return _Batches("the function of data", data, None, repeatable=True)
    raise DataError(
        f"No batches can be made of data of type {type(data).__name__}: {_short(data)}. Pass arrays (NumPy, pandas, or "
        "tensors) in a tuple or dict, a tf.data.Dataset, a torch DataLoader, a keras.utils.PyDataset, an iterable of "
        "batches, or a function that returns one. Lists of numbers become arrays by np.array(...)."
    )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # A tf.data.Dataset of unknown cardinality, a DataLoader over a stream.
        return None


def is_arrays(data: Any) -> bool:
    """Whether data is arrays to be cut into batches, rather than a source of batches."""
    leaves = optree.tree_leaves(data)
    return bool(leaves) and all(_is_array(leaf) for leaf in leaves)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and (hasattr(leaf, "__array__") or hasattr(leaf, "to_numpy"))


def _host_array(leaf: Any, path: Sequence[Any]) -> np.ndarray:
    """An array in host memory, where slicing costs least."""
    if hasattr(leaf, "to_numpy"):
        array = np.asarray(leaf.to_numpy())
    else:
        array = keras.ops.convert_to_numpy(leaf) if keras.ops.is_tensor(leaf) else np.asarray(leaf)
    if array.ndim == 0:
        raise DataError(f"{_path(path)} is a single number; data has an axis of examples first.")
    if array.dtype == object:
        raise DataError(
            f"{_path(path)} holds Python objects (dtype object), for example {_short(array.flat[0])}. Convert it to "
            "numbers first, for example with .astype('float32')."
        )
    return array


def _common_length(arrays: Sequence[np.ndarray], paths: Sequence[Sequence[Any]]) -> int:
    lengths = {_path(path): len(array) for path, array in zip(paths, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"All arrays must have the same number of examples (their first axis); {sizes}.")
    count = next(iter(lengths.values()))
    if not count:
        raise DataError("The data is empty: its arrays have no examples (their first axis is 0 long).")
    return count


def _is_state(state: Any) -> bool:
    if not isinstance(state, dict) or set(state) != {"epoch", "batch", "seed"}:
        return False
    whole = all(isinstance(value, (int, np.integer)) for value in state.values())
    return whole and min(state["epoch"], state["batch"]) >= 0


def _as_tensor(leaf: Any) -> Any:
    # A source may write its next batch over the last one, which the device perhaps has still to read: hence a copy.
    return backend.to_tensor(leaf if keras.ops.is_tensor(leaf) else np.array(leaf))


def _path(path: Sequence[Any]) -> str:
    """Where an array stands in the data. Of a tuple, Keras's names: x, y, sample_weight."""
    if not path:
        return "the data"
    first = ("x", "y", "sample_weight")[path[0]] if path[0] in (0, 1, 2) else repr(path[0])
    return first + "".join(f"[{part!r}]" for part in path[1:])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
