"""Hugging Face `datasets`: finds streams whose saved position is incomplete.

Uses internals: `IterableDataset._ex_iterable`, the chain of transformations of the examples, and the class name of the
transformation that shuffles through a buffer. `state_dict()` does not include the buffer, so examples would be lost.
"""

from collections.abc import Iterator
from typing import Any


def forgets_a_buffer(data: Any) -> bool:
    """Whether the state of a data set, or of a loader over one, omits examples that are read and not yet returned."""
    chain = getattr(data, "_ex_iterable", None) or getattr(getattr(data, "dataset", None), "_ex_iterable", None)
    return any(type(link).__name__ == "BufferShuffledExamplesIterable" for link in _links(chain))


def _links(link: Any) -> Iterator[Any]:
    if link is not None:
        yield link
        for inner in [getattr(link, "ex_iterable", None), *getattr(link, "ex_iterables", ())]:
            yield from _links(inner)
