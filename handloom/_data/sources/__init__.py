"""Sources of batches, one kind of data a file; `handloom/_data/feed.py` makes feeds of them."""

from handloom._data.sources.base import Batch, Source
from handloom._data.sources.choice import source_of
from handloom._data.sources.leaves import is_arrays, on_host

__all__ = ["Batch", "Source", "is_arrays", "on_host", "source_of"]
