"""One Python value that a compiled function may hold as a constant: where it is held, and whether it has changed."""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

COLLECTIONS = (list, tuple, set, frozenset, deque)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_MOST_PLAIN = 1000  # Of plain elements.


class Value(NamedTuple):
    """A value, where it is held.

    Attributes:
        get: Takes the holder, the name and a default: `getattr` or `dict.get`.
        holder: What holds it.
        name: Its name there.
        path: What the user writes to get it.
        value: The value itself; of a list of plain values a copy.
        can_be_variable: Whether a variable can take its place: not where Keras reads a number, nor in a metric, whose
            variables Keras resets.
    """

    get: Callable[[Any, Any, Any], Any]
    holder: Any
    name: Any
    path: str
    value: Any
    can_be_variable: bool = True

    @property
    def key(self) -> tuple[int, Any]:
        return id(self.holder), self.name

    @property
    def path_parts(self) -> list[str]:
        """The names in its path, also the keys."""
        return self.path.translate(_WITHOUT_BRACKETS).split(".")

    @property
    def last_name(self) -> str:
        """The last name in its path: that of an attribute, a variable or a key."""
        return self.path_parts[-1]

    @property
    def is_plain(self) -> bool:
        """Whether it is known by its value; otherwise by its identity."""
        return is_plain(self.value)

    @property
    def is_contents(self) -> bool:
        """Whether it is what an array contains, rather than what something holds."""
        return self.get is contents_of

    @property
    def shown(self) -> str:
        """The value as text: a plain one in full."""
        if self.is_contents:
            array = np.frombuffer(self.value, self.holder.dtype).reshape(self.holder.shape)
            return np.array2string(array, threshold=6, separator=", ")
        return repr(self.value) if is_plain(self.value) else f"a {type(self.value).__name__}"

    @property
    def now(self) -> "Value":
        """The same with the value that is there now."""
        return self._replace(value=self.present)

    @property
    def is_number(self) -> bool:
        return isinstance(self.value, (int, float)) and not isinstance(self.value, bool)

    @property
    def has_other_elements(self) -> bool:
        """Whether it is a list that has as many elements as before: it is no collection of what has happened."""
        both = isinstance(self.value, (list, tuple)) and isinstance(self.present, (list, tuple))
        return both and len(self.value) == len(self.present)

    @property
    def present(self) -> Any:
        """What is there now."""
        with contextlib.suppress(ValueError):  # A variable of a function that has no value yet.
            return self.get(self.holder, self.name, None)
        return None

    @property
    def is_made_now(self) -> bool:
        """Whether there is an object now where there was nothing: it stays, unlike what is counted or collected."""
        is_empty = isinstance(self.value, list) and not self.value
        return self.value is None or (is_empty and not self.now.is_plain)

    @property
    def has_changed(self) -> bool:
        """Whether another value is there now."""
        now = self.present
        with contextlib.suppress(ValueError):  # An array in place of a list.
            return bool(now != self.value) if self.is_plain and is_plain(now) else now is not self.value
        return True


def element_of(elements: Sequence[Any], index: int, default: Any) -> Any:
    """An element of a list, as `dict.get` gives a value of a dict."""
    return elements[index] if index < len(elements) else default


def contents_of(array: np.ndarray, *_: Any) -> bytes:
    """What an array contains, whatever its name."""
    return array.tobytes()


_WITHOUT_BRACKETS = str.maketrans({"[": ".", "]": None, "'": None})


def is_plain(value: Any) -> bool:
    """Whether a value is known by what it is: a number, a text, or a collection of these."""
    if isinstance(value, COLLECTIONS):
        return len(value) <= _MOST_PLAIN and all(isinstance(each, _PLAIN) for each in value)
    return isinstance(value, _PLAIN)
