"""`keras.utils.PyDataset`: numbered batches, read by workers."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handloom._data.sources.base import Batch, BatchCheck, Source, permutation
from handloom._data.sources.processes import processes_of, read_ahead
from handloom._keras import keras
from handloom.errors import DataError


class PyDatasets(Source):
    """A `PyDataset`, read by index with its workers. Any position is restored at once."""

    name = "the PyDataset"

    def __init__(self, data: keras.utils.PyDataset, shuffle: bool) -> None:
        self._data, self._shuffle = data, shuffle
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
        if data.use_multiprocessing and data.workers:
            return processes_of(data).read(data, indices)
        if data.workers > 1:
            return _threads_read(data, indices)
        return map(data.__getitem__, indices)


def _threads_read(data: keras.utils.PyDataset, indices: Iterable[int]) -> Iterator[Any]:
    pool = ThreadPoolExecutor(data.workers)
    try:
        yield from read_ahead(lambda index: pool.submit(data.__getitem__, index), indices, data.max_queue_size)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
