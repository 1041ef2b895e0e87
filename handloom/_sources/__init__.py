"""Sources of batches, one kind of data a file; `handloom/_data.py` makes feeds of them."""

from handloom._sources._base import Batch, Source
from handloom._sources._choice import source_of
from handloom._sources._leaves import is_arrays, on_host

__all__ = ["Batch", "Source", "is_arrays", "on_host", "source_of"]
