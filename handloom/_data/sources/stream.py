"""Sources that are read from their beginning: iterables, generators, loaders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from handloom._data.sources.base import Batch, Look, Source
from handloom.checkpoint.encoding import decode_position
from handloom.errors import DataError


class Reader(Protocol):
    """Begins passes over some data, and says where the last one stands."""

    @property
    def exact(self) -> bool | None:
        """Whether it can go back to where it stood; `None` if that shows only once a pass has begun."""

    def begin(self) -> Iterator[Any]:
        """A new pass."""

    def state(self) -> Any:
        """Where the pass begun last stands, in plain values; `None` if, after all, that can't be said."""

    def go_on(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        """Goes back to where it stood, which is before batch number `batch`, or between two passes if that is `None`.

        Returns:
            The rest of that pass; between two passes the next one, or `None` to have it begun.
        """


class Stream(Source):
    """What a reader reads. Without an exact one, a position is reached by reading up to it.

    Args:
        name: What it is called.
        data: What is read, as the user gave it: it is told of each epoch, if it wants to know.
        reader: What reads it.
        length: Batches in a pass, `None` if unknown.
        repeatable: Whether there can be more than one pass.
    """

    def __init__(self, name: str, data: Any, reader: Reader, length: int | None, *, repeatable: bool = True) -> None:
        self.name, self.length, self.repeatable = name, length, repeatable
        self._data, self._reader = data, reader
        self._ready: tuple[Iterator[Any], int] | None = None  # A pass, and the number of its next batch.
        self._stands: Any = None  # Where, if nothing was given since that was noted.
        self._under_way: bool | None = None  # Whether a pass is; `None` before the first.

    @property
    def seekable(self) -> bool:
        if self._reader.exact is None and self._ready is None:
            self._ready = self._begin(0), 0
        return bool(self._reader.exact)

    def peek(self, epoch: int, look: Look | None = None) -> Batch:
        given, number = self._ready or (self._begin(epoch), 0)
        self._stands = self._stands or self._where(under_way=True)
        first = list(itertools.islice(given, 1))
        self._ready = itertools.chain(first, given), number
        if not first:
            raise DataError(f"HL426: The data is empty: {self.name} gave no batch.")
        return self._as_batch(first[0], look)

    def batches(self, epoch: int, start: int, look: Look | None = None) -> Iterator[Batch]:
        given, number = self._ready or (self._begin(epoch), 0)
        self._ready, self._under_way = None, True
        for batch in itertools.islice(given, start - number, None):
            self._stands = None
            yield self._as_batch(batch, look)
        self._stands, self._under_way = None, False

    def state(self) -> Any:
        if self._stands is None and self._under_way is not None:
            return self._where(under_way=self._under_way)
        return self._stands

    def restore(self, state: Any, epoch: int, start: int) -> None:
        if state is not None and self.seekable:
            self._tell(epoch)
            given = self._gone_back(state, start)
            self._stands, self._ready = state, None if given is None else (given, start)
            return
        self._stands = self._under_way = None
        if self.repeatable:  # Else it can't be begun again.
            self._ready = None

    def _gone_back(self, state: Any, start: int) -> Iterator[Any] | None:
        try:
            position = decode_position(state["at"]) if "at" in state else state["position"]  # "at" is of format 1.
            return self._reader.go_on(position, start if state["under_way"] else None)
        except Exception as error:  # Whatever a library says of what it cannot use.
            raise DataError(
                f"HL427: {self.name} cannot go back to the position in the state: {error} Make it as the one was that "
                "the state is of.",
            ) from error

    def _begin(self, epoch: int) -> Iterator[Any]:
        self._tell(epoch)
        return self._reader.begin()

    def _where(self, *, under_way: bool) -> Any:
        at = self._reader.state() if self._reader.exact else None
        return None if at is None else {"under_way": under_way, "position": at}

    def _tell(self, epoch: int) -> None:
        """Tells the data, or the sampler in it, the number of the epoch, of which its order may be a function."""
        parts = (getattr(self._data, name, None) for name in ("sampler", "batch_sampler", "dataset"))
        for part in (self._data, *parts):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)


class ByIterator:
    """Reads what is iterated. It knows its position if its iterators have `get_state()` and `set_state(state)`."""

    def __init__(self, iterate: Callable[[], Iterable[Any]]) -> None:
        self._iterate = iterate
        self._iterator: Any = None

    @property
    def exact(self) -> bool | None:
        if self._iterator is None:
            return None
        return all(hasattr(self._iterator, method) for method in ("get_state", "set_state"))

    def begin(self) -> Iterator[Any]:
        self._iterator = iter(self._iterate())
        return iter(self._iterator)

    def state(self) -> Any:
        return self._iterator.get_state()

    def go_on(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        iterator: Any = iter(self._iterate())
        iterator.set_state(state)
        self._iterator = iterator
        return None if batch is None else iter(iterator)


class ByLoader:
    """Reads what has `state_dict()` and `load_state_dict(state)` itself, as a `StatefulDataLoader` has."""

    exact = True

    def __init__(self, data: Any) -> None:
        self._data = data

    def begin(self) -> Iterator[Any]:
        return iter(self._data)

    def state(self) -> Any:
        return self._data.state_dict()

    def go_on(self, state: Any, batch: int | None) -> Iterator[Any] | None:
        del batch  # At the end of a pass, the next one begins.
        self._data.load_state_dict(state)
        return self.begin()
