"""Hugging Face's `datasets`: what a data set that is streamed cannot say of its own position.

Internals used: `IterableDataset._ex_iterable`, the chain of what is done with the examples, with the name of its one
link that shuffles through a buffer. What is in the buffer is no part of `state_dict()`, so that examples would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BUFFERED = "BufferShuffledExamplesIterable"


def forgets_a_buffer(data: Any) -> bool:
    """Whether the state of a data set, or of a loader over one, leaves out examples it has read and not given."""
    chain = getattr(data, "_ex_iterable", None) or getattr(getattr(data, "dataset", None), "_ex_iterable", None)
    return any(type(link).__name__ == _BUFFERED for link in _links(chain))


def _links(link: Any) -> Iterator[Any]:
    if link is not None:
        yield link
        for inner in [getattr(link, "ex_iterable", None), *getattr(link, "ex_iterables", ())]:
            yield from _links(inner)
