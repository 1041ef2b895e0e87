"""`keras.utils.PyDataset`: numbered batches, read by workers."""

import collections
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

from handloom._data.sources.base import Batch, BatchCheck, Source, permutation
from handloom._keras import keras
from handloom.errors import DataError


class PyDatasets(Source):
    """A `PyDataset`, read by index with its workers. Any position is restored at once."""

    name = "the PyDataset"

    def __init__(self, data: keras.utils.PyDataset, shuffle: bool) -> None:
        self._data, self._shuffle = data, shuffle
        self._processes = _Processes(data)
        self.length = data.num_batches
        if self.length == 0:
            raise DataError("HL425: The data is empty: the PyDataset has length 0.")

    def batches(self, epoch: int, start: int, check: BatchCheck | None = None) -> Iterator[Batch]:
        self._data.on_epoch_begin()
        for batch in self._read(self._indices(epoch, start)):
            yield self._as_batch(batch, check)
        self._data.on_epoch_end()

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"shuffle": self._shuffle}

    def _indices(self, epoch: int, start: int) -> Iterable[int]:
        if self.length is None:
            return itertools.count(start)
        if self._shuffle:
            return map(int, permutation(self.seed, epoch, self.length)[start:])
        return range(start, self.length)

    def _read(self, indices: Iterable[int]) -> Iterator[Any]:
        data = self._data
        if data.use_multiprocessing:
            return self._processes.read(indices)
        if data.workers > 1:
            return _threads_read(data, indices)
        return map(data.__getitem__, indices)


class _Processes:
    """Worker processes, each with a copy of the data; they are kept from pass to pass until the data changes.

    Starting one takes seconds: it is a new Python process, which imports Keras and a backend.
    """

    def __init__(self, data: keras.utils.PyDataset) -> None:
        self._data = data
        self._pool: ProcessPoolExecutor | None = None
        self._copied = b""

    def read(self, indices: Iterable[int]) -> Iterator[Any]:
        pool, self._pool = self._ready(), None
        try:
            yield from _read_ahead(pool, _read_in_worker, indices, self._data.max_queue_size)
            self._pool = pool  # Not reached if the pass is abandoned, or fails.
        finally:
            if self._pool is None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ready(self) -> ProcessPoolExecutor:
        now = pickle.dumps(self._data)  # The form in which workers receive it; only they read it.
        if self._pool is not None and now == self._copied:
            return self._pool
        if self._pool is not None:  # The data has changed, perhaps at the end of the last epoch.
            self._pool.shutdown(wait=False)
        self._copied = now
        # Spawned: a forked child of a process that runs a backend's threads may hang.
        return ProcessPoolExecutor(self._data.workers, get_context("spawn"), _keep_in_worker, (self._data,))


_in_worker: list[keras.utils.PyDataset] = []


def _keep_in_worker(data: keras.utils.PyDataset) -> None:
    _in_worker[:] = [data]


def _read_in_worker(index: int) -> Any:
    return _in_worker[0][index]


def _threads_read(data: keras.utils.PyDataset, indices: Iterable[int]) -> Iterator[Any]:
    pool = ThreadPoolExecutor(data.workers)
    try:
        yield from _read_ahead(pool, data.__getitem__, indices, data.max_queue_size)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read_ahead(pool: Executor, read: Callable[[int], Any], indices: Iterable[int], size: int) -> Iterator[Any]:
    """Results of `read` in order, with up to `size` of them pending at a time."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    for index in indices:
        waiting.append(pool.submit(read, index))
        if len(waiting) >= max(size, 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
