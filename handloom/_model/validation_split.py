"""The validation split: the last examples of the data, on which a fit validates."""

from typing import Any

import optree

from handloom._data.sources import is_arrays
from handloom._interop.tensors import rows_of
from handloom._trace.left_out import is_words
from handloom._util.short import short
from handloom.errors import DataError


def split(data: Any, fraction: float) -> tuple[Any, Any]:
    """Splits arrays into all but the last part, and the last part, which is the given fraction of the examples."""
    if not is_arrays(data):
        raise DataError(
            "HL436: validation_split takes the end of arrays, and this data is a source of batches.",
            fix="Pass the batches to validate on as validation_data.",
        )
    if not 0 < fraction < 1:
        raise DataError(f"HL437: validation_split takes a fraction between 0 and 1; received {short(fraction)}.")
    first_leaf = optree.tree_leaves(data, is_leaf=is_words)[0]
    count = int(first_leaf.shape[0]) if hasattr(first_leaf, "shape") else len(first_leaf)
    first = int(count * (1 - fraction))
    if first in (0, count):
        raise DataError(f"HL438: validation_split={fraction} of {count} example(s) leaves an empty part.")

    def rows(chosen: slice) -> Any:
        return optree.tree_map(lambda array: rows_of(array, chosen), data, is_leaf=is_words)

    return rows(slice(first)), rows(slice(first, None))
