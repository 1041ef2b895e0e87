"""Processes that read the batches of a `PyDataset`, each with a copy of it.

A process cannot be forked from this one, in which a backend runs threads: it might hang. A new one has to import the
user's script, Keras and a backend, which takes seconds. So processes are kept as long as the data set lives, and data
that changes, mostly at the end of an epoch, is sent to them again, through a file.
"""

import collections
import hashlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from handloom._keras import keras
from handloom._util.findings import warn
from handloom.errors import DataError

_PATIENCE = 5.0
"""Seconds until a user hears that processes are starting."""

_SPAWN = multiprocessing.get_context("spawn")
_INSTEAD = "use_multiprocessing=False in the PyDataset reads in threads, which start at once."


class Processes:
    """The processes that read one data set.

    Args:
        workers: How many.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._others = workers, set(multiprocessing.active_children())
        # Ctrl-C reaches them too, but only this process knows when to stop.
        self._pool = ProcessPoolExecutor(workers, _SPAWN, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        self._started: dict[int | None, Any] = {}
        self._copy: _Copy | None = None
        self._has_read = self.broken = False

    def read(self, data: keras.utils.PyDataset, indices: Iterable[int]) -> Iterator[Any]:
        """The batches of these numbers, of the data as it is now.

        Raises:
            DataError: The data cannot be sent to other processes, or one of them ended.
        """
        pickled = _pickled(data)
        digest = hashlib.sha256(pickled).digest()
        if self._copy is None or self._copy.digest != digest:
            self._copy = _Copy(pickled, digest)
        copy = self._copy  # Its file stays until this pass has ended.

        def submit(index: int) -> Future[Any]:
            return self._submit(copy.path, index)

        try:
            yield from read_ahead(submit, indices, data.max_queue_size, self._wait)
        except BrokenProcessPool as error:
            self.broken = True
            raise self._ended() from error

    def _submit(self, path: str, index: int) -> Future[Any]:
        future = self._pool.submit(_read, path, index)
        if len(self._started) < self._workers:
            children = set(multiprocessing.active_children()) - self._others
            self._started |= {child.pid: child for child in children}
        return future

    def _wait(self, future: Future[Any]) -> None:
        if not self._has_read and wait([future], _PATIENCE).not_done:
            warn(
                f"HL442: The {self._workers} worker process(es) of the PyDataset have not given a batch in "
                f"{_PATIENCE:.0f} seconds.",
                "Each is a new Python process, which first imports your script and Keras.",
                f"They start once. {_INSTEAD}",
            )
            wait([future])
        self._has_read = True

    def _ended(self) -> DataError:
        self._pool.shutdown()  # The codes are known once its own thread has waited for the processes.
        codes = {pid: process.exitcode for pid, process in self._started.items()}
        # The others were terminated afterwards.
        first = next((pid for pid, code in codes.items() if code not in (None, 0, -signal.SIGTERM)), None)
        how = f"process {first}, {_in_words(codes[first])}" if first else "it was terminated"
        return DataError(
            f"HL443: A worker process of the PyDataset ended ({how}).",
            "Its own message, if it had one, is above.",
            "If it could not start, run the script's own code under if __name__ == '__main__':, and define the "
            "PyDataset in a file, not in a notebook. If it was killed, there may be too little memory: use fewer "
            f"workers. {_INSTEAD}",
        )


_processes: dict[int, Processes] = {}  # By id: a data set may have no hash.


def processes_of(data: keras.utils.PyDataset) -> Processes:
    """The processes that read a data set; they end with it."""
    processes = _processes.get(id(data))
    if processes is None or processes.broken:
        processes = _processes[id(data)] = Processes(data.workers)
        weakref.finalize(data, _processes.pop, id(data), None)
    return processes


def read_ahead(
    submit: Callable[[int], Future[Any]],
    indices: Iterable[int],
    size: int,
    before: Callable[[Future[Any]], None] = lambda _: None,
) -> Iterator[Any]:
    """Results in order, with up to `size` of them pending at a time.

    Args:
        submit: Begins to read the batch of an index.
        indices: The indices.
        size: How many batches to read ahead.
        before: Called with each pending result before it is waited for.
    """
    waiting: collections.deque[Future[Any]] = collections.deque()

    def next_result() -> Any:
        before(waiting[0])
        return waiting.popleft().result()

    try:
        for index in indices:
            waiting.append(submit(index))
            if len(waiting) >= max(size, 1):
                yield next_result()
        while waiting:
            yield next_result()
    finally:
        for future in waiting:
            future.cancel()


class _Copy:
    """Pickled data in a file, which is removed with this object."""

    def __init__(self, pickled: bytes, digest: bytes) -> None:
        self.digest = digest
        handle, self.path = tempfile.mkstemp(prefix="handloom-", suffix=".pickle")
        with os.fdopen(handle, "wb") as file:
            file.write(pickled)
        weakref.finalize(self, os.unlink, self.path)


_in_worker: dict[str, keras.utils.PyDataset] = {}


def _read(path: str, index: int) -> Any:
    """Reads a batch, in a worker."""
    if path not in _in_worker:
        with open(path, "rb") as file:
            data = pickle.load(file)
        _in_worker.clear()
        _in_worker[path] = data
    return _in_worker[path][index]


def _pickled(data: keras.utils.PyDataset) -> bytes:
    try:
        return pickle.dumps(data)
    except Exception as error:  # Pickle raises errors of several classes, and user's classes of any.
        raise DataError(
            f"HL444: The PyDataset cannot be sent to worker processes: {error}.",
            fix=f"Keep no open files, locks or local functions in it. {_INSTEAD}",
        ) from error


def _in_words(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by the signal {signal.Signals(-code).name}"
