"""Which source reads which data."""

from __future__ import annotations

import numbers
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from handloom._data.sources.arrays import Arrays
from handloom._data.sources.base import Source
from handloom._data.sources.leaves import is_arrays, short
from handloom._data.sources.py_dataset import PyDatasets
from handloom._data.sources.stream import ByIterator, ByLoader, Reader, Stream
from handloom._data.sources.table import Columns, Table, is_stream_of_columns, is_table
from handloom._interop.hugging_face import forgets_a_buffer
from handloom._interop.tensorflow_data import tensorflow_data
from handloom._interop.torch_data import torch_data
from handloom._keras import keras
from handloom.errors import DataError

_DEFAULT_BATCH_SIZE = 32


def source_of(data: Any, batch_size: int | None, shuffle: bool, drop_remainder: bool) -> Source:
    """The source for some data.

    Raises:
        DataError: If no batches can be made of it, or not with these options.
    """
    whole = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if batch_size is not None and not (whole and batch_size > 0):
        raise DataError(f"HL416: batch_size takes a positive whole number; received {batch_size!r}.")
    if is_arrays(data):
        return Arrays(data, batch_size or _DEFAULT_BATCH_SIZE, shuffle, drop_remainder)
    if is_table(data):
        return Table(data, batch_size or _DEFAULT_BATCH_SIZE, shuffle, drop_remainder)
    source = _batched_source(data, shuffle)
    refused = {"batch_size": batch_size is not None, "drop_remainder": drop_remainder}
    refused["shuffle"] = shuffle and not isinstance(source, PyDatasets)
    for option, given in refused.items():
        if given:
            raise DataError(
                f"HL417: {option} is for arrays; {source.name} gives batches already. Set it where they are made."
            )
    return source


def _batched_source(data: Any, shuffle: bool) -> Source:
    if isinstance(data, keras.utils.PyDataset):
        return PyDatasets(data, shuffle)
    if isinstance(data, Iterator):
        kind = "the generator" if isinstance(data, types.GeneratorType) else f"the {type(data).__name__}"
        return Stream(kind, data, ByIterator(lambda: data), None, repeatable=False)
    if isinstance(data, Iterable) and not isinstance(data, _NO_SOURCES):
        return Stream(f"the {type(data).__name__.lstrip('_')}", data, _reader(data), _length(data))
    if callable(data) and not isinstance(data, keras.Layer):
        return Stream("the function of data", data, ByIterator(data), None)
    raise DataError(
        f"HL418: No batches can be made of data of type {type(data).__name__}: {short(data)}. Pass arrays (NumPy, "
        "pandas, or tensors) in a tuple or dict, a tf.data.Dataset, a torch DataLoader, a keras.utils.PyDataset, a "
        "Grain or Hugging Face data set, an iterable of batches, or a function that returns one. Lists of numbers "
        "become arrays by np.array(...).",
    )


_NO_SOURCES = (str, bytes, list, tuple, dict)


def _reader(data: Any) -> Reader:
    """What reads an iterable: by the position that it keeps, if it keeps one."""
    framework = tensorflow_data(data) or torch_data(data)
    if framework is not None:
        return framework
    if is_stream_of_columns(data):
        return Columns(data)
    stateful = all(callable(getattr(data, method, None)) for method in ("state_dict", "load_state_dict"))
    return ByLoader(data) if stateful and not forgets_a_buffer(data) else ByIterator(lambda: data)


def _length(data: Any) -> int | None:
    try:
        length = len(data)
    except TypeError:  # A tf.data.Dataset of unknown cardinality, a DataLoader over a stream.
        return None
    return None if length == sys.maxsize else length  # What has no end, to Grain.
