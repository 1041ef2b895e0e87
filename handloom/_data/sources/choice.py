"""Chooses the source for some data."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from handloom._data.sources.arrays import Arrays
from handloom._data.sources.base import Source, has
from handloom._data.sources.leaves import is_arrays
from handloom._data.sources.py_dataset import PyDatasets
from handloom._data.sources.stream import ByIterator, ByLoader, Reader, Stream
from handloom._data.sources.table import Columns, Table, is_stream_of_columns, is_table
from handloom._interop.hugging_face import forgets_a_buffer
from handloom._interop.tensorflow_data import tensorflow_data
from handloom._interop.torch_data import torch_data
from handloom._keras import keras
from handloom._util.arguments import whole_number
from handloom._util.short import short
from handloom.errors import DataError

_DEFAULT_BATCH_SIZE = 32
_NOT_SOURCES = (str, bytes, list, tuple, dict)


def source_of(data: Any, batch_size: int | None, shuffle: bool, drop_remainder: bool) -> Source:
    """The source for some data.

    Raises:
        ArgumentError: The batch size is not a positive whole number.
        DataError: No batches can be made of the data, or not with these options.
    """
    size = _DEFAULT_BATCH_SIZE if batch_size is None else whole_number("hl.Feed", batch_size=batch_size)
    if is_arrays(data):
        return Arrays(data, size, shuffle, drop_remainder)
    if is_table(data):
        return Table(data, size, shuffle, drop_remainder)
    source = _batched_source(data, shuffle)
    refused = {"batch_size": batch_size, "drop_remainder": drop_remainder}
    refused["shuffle"] = shuffle and not isinstance(source, PyDatasets)
    for option, given in refused.items():
        if given:
            raise DataError(
                f"HL417: {option} is for arrays; {source.name} gives batches already.",
                fix=f"Set {option} where the batches are made.",
            )
    return source


def _batched_source(data: Any, shuffle: bool) -> Source:
    if isinstance(data, keras.utils.PyDataset):
        return PyDatasets(data, shuffle)
    if isinstance(data, Iterator):
        return Stream(f"the {type(data).__name__}", data, ByIterator(lambda: data), None, repeatable=False)
    if isinstance(data, Iterable) and not isinstance(data, _NOT_SOURCES):
        return Stream(f"the {type(data).__name__.lstrip('_')}", data, _reader(data), _length(data))
    if callable(data) and not isinstance(data, keras.Layer):
        return Stream("the function of data", data, ByIterator(data), None)
    raise DataError(
        f"HL418: No batches can be made of data of type {type(data).__name__}: {short(data)}.",
        fix="Pass arrays (NumPy, pandas, or tensors) in a tuple or dict, a tf.data.Dataset, a torch DataLoader, a "
        "keras.utils.PyDataset, a Grain or Hugging Face data set, an iterable of batches, or a function that returns "
        "one. Convert lists of numbers with np.array(...).",
    )


def _reader(data: Any) -> Reader:
    """The reader of an iterable: the one that restores its position, if there is one."""
    if reader := tensorflow_data(data) or torch_data(data):
        return reader
    if is_stream_of_columns(data):
        return Columns(data)
    stateful = has(data, "state_dict", "load_state_dict") and not forgets_a_buffer(data)
    return ByLoader(data) if stateful else ByIterator(lambda: data)


def _length(data: Any) -> int | None:
    try:
        length = len(data)
    except TypeError:  # A tf.data.Dataset of unknown cardinality, a DataLoader over a stream.
        return None
    return None if length == sys.maxsize else length  # Grain's length of data without an end.
