"""Parts of a batch that no tensor can hold, such as a column of text: a step may pass them over, but not use them."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import optree

from handloom._util.short import short
from handloom.backends import backend
from handloom.backends.operators import COMPARISONS, TWO_WAYS
from handloom.errors import DataError


class LeftOut:
    """Takes the place of data that the backend cannot hold. Whatever is done with it raises the error that says so.

    Args:
        error: The error.
    """

    def __init__(self, error: DataError) -> None:
        self._error = error

    def __repr__(self) -> str:
        return "left out"

    def refuse(self, *_: Any, **__: Any) -> Any:
        """Raises the error, at the line of the user's code that uses it."""
        raise LeftOutError(*self._error.args)

    __getattr__ = refuse
    __hash__ = object.__hash__


class LeftOutError(DataError, AttributeError):
    """Data is used that was left out. For `hasattr`, it has no attributes."""


_USES = [
    *("array", "jax_array", "tf_tensor", "len", "iter", "getitem", "contains", "bool", "float", "int", "index"),
    *("neg", "abs", "invert", *COMPARISONS, *TWO_WAYS),
    *(f"r{name}" for name in TWO_WAYS),
]
for _name in _USES:
    setattr(LeftOut, f"__{_name}__", LeftOut.refuse)


def is_words(node: Any) -> bool:
    """Whether a node of a structure is a list or tuple of text, such as a `DataLoader` gives: it is one array."""
    return isinstance(node, (list, tuple)) and bool(node) and all(isinstance(word, (str, bytes)) for word in node)


def is_text(array: np.ndarray) -> bool:
    """Whether an array holds text; that of pandas is an array of Python's strings."""
    if array.dtype.kind == "O":
        return array.size > 0 and all(isinstance(value, (str, bytes)) for value in array.flat)
    return array.dtype.kind in "SU"


def text_left_out(name: str, array: np.ndarray) -> LeftOut:
    """Takes the place of text on a backend that has none."""
    example = short(next(iter(array.ravel().tolist()), ""))
    return LeftOut(
        DataError(
            f"HL424: {name} is text, for example {example}; this backend has no text.",
            fix="Convert it to numbers: labels with np.unique(labels, return_inverse=True)[1], text with "
            "keras.layers.StringLookup or TextVectorization in a pipeline of tf.data. Or leave it out.",
        )
    )


def without_text(arguments: Any) -> Any:
    """The arguments of a function; on a backend without text, text in NumPy arrays is left out."""
    if backend.holds_text:
        return arguments
    return optree.tree_map(_left_out_if_text, arguments)


def _left_out_if_text(leaf: Any) -> Any:
    return text_left_out("An array", leaf) if isinstance(leaf, np.ndarray) and is_text(leaf) else leaf


_PLAIN = re.compile(r"\x1b\[\dm")


@contextlib.contextmanager
def passed_over(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The inputs of a layer; those in a dict without the parts that are left out, as a layer may not use them."""
    dropped: dict[Any, LeftOut] = {}
    try:
        yield tuple(_without(argument, dropped) for argument in inputs)
    except KeyError as error:
        asked = {key for key in error.args[:1] if isinstance(key, str)}
        asked |= {line for key in asked for line in _PLAIN.sub("", key).splitlines()}  # Keras adds lines to a key.
        for name in asked & dropped.keys():
            dropped[name].refuse()
        raise


def _without(argument: Any, dropped: dict[Any, LeftOut]) -> Any:
    if type(argument) is not dict:
        return argument
    dropped |= {name: part for name, part in argument.items() if isinstance(part, LeftOut)}
    return {name: part for name, part in argument.items() if name not in dropped}
