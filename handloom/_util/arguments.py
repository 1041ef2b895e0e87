"""Checks of arguments that many functions take."""

from __future__ import annotations

import numbers
from typing import Any

from handloom.errors import ArgumentError


def whole_number(of: str, *, least: Any = 1, **argument: Any) -> int:
    """The one argument given, as an `int`.

    Args:
        of: The function or class that takes it.
        least: The least that it may be.
        argument: Name and value.

    Raises:
        ArgumentError: If it is no whole number, or too small.
    """
    [(name, value)] = argument.items()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ArgumentError("HL004", f"{of}({name}=...) takes a whole number, at least {least}; received {value!r}.")
    return int(value)


def positive_number(of: str, **argument: Any) -> float:
    """The one argument given, a number above zero.

    Raises:
        ArgumentError: If it is no number, or not above zero.
    """
    [(name, value)] = argument.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ArgumentError("HL005", f"{of}({name}=...) takes a positive number; received {value!r}.")
    return value
