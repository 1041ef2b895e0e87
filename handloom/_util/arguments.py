"""Checks of arguments."""

import numbers
from typing import Any

from handloom.errors import ArgumentError


def whole_number(of: str, *, least: Any = 1, **argument: Any) -> int:
    """Returns an argument as an `int`.

    Args:
        of: The function or class that takes the argument.
        least: The smallest value allowed.
        argument: The name and value of the argument.

    Raises:
        ArgumentError: The value is not a whole number, or is too small.
    """
    [(name, value)] = argument.items()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ArgumentError(f"HL004: {of}({name}=...) takes a whole number, at least {least}; received {value!r}.")
    return int(value)


def positive_number(of: str, **argument: Any) -> float:
    """Returns an argument that is a number above zero, as a `float`.

    Raises:
        ArgumentError: The value is not a number, or not above zero.
    """
    [(name, value)] = argument.items()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0:
        raise ArgumentError(f"HL005: {of}({name}=...) takes a positive number; received {value!r}.")
    return float(value)
