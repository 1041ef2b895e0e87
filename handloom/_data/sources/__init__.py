"""Sources of batches, one kind of data a file; `handloom/_data/feed.py` makes feeds of them."""

from handloom._data.sources.base import Batch as Batch
from handloom._data.sources.choice import source_of as source_of
from handloom._data.sources.leaves import is_arrays as is_arrays
from handloom._data.sources.leaves import on_host as on_host
