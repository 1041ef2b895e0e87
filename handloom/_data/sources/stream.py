"""Sources that are read from their beginning: iterables, generators, loaders."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from handloom._data.sources.base import Batch, BatchCheck, Source, has
from handloom.checkpoint.encoding import decode_position
from handloom.errors import DataError


class Reader(Protocol):
    """Begins passes over some data, and knows the position of the last one."""

    @property
    def exact(self) -> bool | None:
        """Whether it can restore a position; `None` if that is not known before a pass has begun."""

    def begin(self) -> Iterator[Any]:
        """Begins a new pass."""

    def state(self) -> Any:
        """The position of the last pass, in plain values; `None` if it turns out to be unknown."""

    def resume(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        """Restores a position, which is before batch number `batch`, or between two passes if that is `None`.

        Returns:
            The rest of that pass. Between two passes, the next pass, or `None` if `begin` should begin it.
        """


class Stream(Source):
    """Batches from a reader. If the reader is not exact, restoring a position reads all batches before it.

    Args:
        name: The name of the data in messages.
        data: The user's data. Its `set_epoch` method, if it has one, is called with the number of each epoch.
        reader: Reads the data.
        length: Batches in a pass, `None` if unknown.
        repeatable: Whether there can be more than one pass.
    """

    def __init__(self, name: str, data: Any, reader: Reader, length: int | None, *, repeatable: bool = True) -> None:
        self.name, self.length, self.repeatable = name, length, repeatable
        self._data, self._reader = data, reader
        self._ready: tuple[Iterator[Any], int] | None = None  # A pass, and the number of its next batch.
        self._position: Any = None  # The state, if no batch was read since it was taken.
        self._within_pass: bool | None = None  # `None` before the first pass.

    @property
    def seekable(self) -> bool:
        if self._reader.exact is None and self._ready is None:
            self._ready = self._begin(0)
        return bool(self._reader.exact)

    def peek(self, epoch: int, check: BatchCheck | None = None) -> Batch:
        first = self._ahead(epoch)
        if not first:
            raise self.empty()
        return self._as_batch(first[0], check)

    def _ahead(self, epoch: int) -> list[Any]:
        """The next batch, or none, as the data gives it; it is read again."""
        batches, number = self._ready or self._begin(epoch)
        self._position = self._position or self._state(within_pass=True)
        first = list(itertools.islice(batches, 1))
        self._ready = itertools.chain(first, batches), number
        return first

    def is_used_up(self) -> bool:
        return not self.repeatable and not self._ahead(0)

    def batches(self, epoch: int, start: int, check: BatchCheck | None = None) -> Iterator[Batch]:
        batches, number = self._ready or self._begin(epoch)
        self._ready, self._within_pass = None, True
        for batch in itertools.islice(batches, start - number, None):
            self._position = None
            yield self._as_batch(batch, check)
        self._position, self._within_pass = None, False

    def state(self) -> Any:
        if self._position is None and self._within_pass is not None:
            return self._state(within_pass=self._within_pass)
        return self._position

    def restore(self, state: Any, epoch: int, start: int) -> None:
        if state is not None and self.seekable:
            self._set_epoch(epoch)
            rest = self._resumed(state, start)
            self._position, self._ready = state, None if rest is None else (rest, start)
            return
        self._position = self._within_pass = None
        if self.repeatable:  # Otherwise the pass cannot begin again.
            self._ready = None

    def _resumed(self, state: Any, start: int) -> Iterator[Any] | None:
        try:
            position = decode_position(state["at"]) if "at" in state else state["position"]  # "at" is of format 1.
            return self._reader.resume(position, start if state["under_way"] else None)
        except Exception as error:  # Libraries raise errors of any class for a state that they cannot use.
            raise DataError(
                f"HL427: {self.name} cannot go back to the position in the state: {error}",
                fix="Create the data in the same way as when the state was saved.",
            ) from error

    def _begin(self, epoch: int) -> tuple[Iterator[Any], int]:
        self._set_epoch(epoch)
        return self._reader.begin(), 0

    def _state(self, *, within_pass: bool) -> Any:
        position = self._reader.state() if self._reader.exact else None
        return None if position is None else {"under_way": within_pass, "position": position}

    def _set_epoch(self, epoch: int) -> None:
        """Passes the number of the epoch to the data, or to its sampler, whose order may depend on it."""
        parts = (getattr(self._data, name, None) for name in ("sampler", "batch_sampler", "dataset"))
        for part in (self._data, *parts):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)


class ByIterator:
    """Reads an iterable. It is exact if the iterators have `get_state()` and `set_state(state)`."""

    def __init__(self, iterate: Callable[[], Iterable[Any]]) -> None:
        self._iterate = iterate
        self._iterator: Any = None

    @property
    def exact(self) -> bool | None:
        return None if self._iterator is None else has(self._iterator, "get_state", "set_state")

    def begin(self) -> Iterator[Any]:
        self._iterator = iter(self._iterate())
        return iter(self._iterator)

    def state(self) -> Any:
        return self._iterator.get_state()

    def resume(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        iterator: Any = iter(self._iterate())
        iterator.set_state(state)
        self._iterator = iterator
        return None if batch is None else iter(iterator)


class ByLoader:
    """Reads a loader that has `state_dict()` and `load_state_dict(state)`, such as a `StatefulDataLoader`."""

    exact = True

    def __init__(self, data: Any) -> None:
        self._data = data

    def begin(self) -> Iterator[Any]:
        return iter(self._data)

    def state(self) -> Any:
        return self._data.state_dict()

    def resume(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        del batch  # After the end of a pass, the loader begins the next one.
        self._data.load_state_dict(state)
        return self.begin()
