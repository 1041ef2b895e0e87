"""Checks of arguments."""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from handloom._util.short import short
from handloom.errors import ArgumentError

P = ParamSpec("P")
T = TypeVar("T")

_OF_FEED = ("batch_size", "shuffle", "drop_remainder")


def one_argument_of_data(of: str, example: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function, whose second argument is the data, refuse calls in the manner of `keras.Model.fit`.

    Args:
        of: The name of the function.
        example: A call with two arrays.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        taken = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if len(args) > 2:
                raise ArgumentError(
                    f"HL035: {of} takes its data as one argument and options by name; "
                    f"received {len(args) - 2} further positional argument(s).",
                    fix=f"Pass several arrays as a tuple: {example}.",
                )
            for name, value in kwargs.items():
                if name not in taken and (fix := _instead(name, value, taken)):
                    raise ArgumentError(f"HL036: {of} has no argument {name}.", fix=fix)
            return function(*args, **kwargs)

        return call

    return decorate


def _instead(name: str, value: Any, taken: Iterable[str]) -> str:
    """What to type instead of an argument that does not exist."""
    if name in _OF_FEED:
        return f"Batches are made by a feed; pass one as the data: hl.Feed((x, y), {name}={short(value)})."
    if name == "validation_data":
        return "Pass a step and its data: validate=(test_step, data)."
    return "".join(f"Did you mean {near}?" for near in difflib.get_close_matches(name, taken, n=1))


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
        raise ArgumentError(f"HL004: {of}({name}=...) takes a whole number, at least {least}; received {short(value)}.")
    return int(value)


def positive_number(of: str, **argument: Any) -> float:
    """Returns an argument that is a number above zero, as a `float`.

    Raises:
        ArgumentError: The value is not a number, or not above zero.
    """
    [(name, value)] = argument.items()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0:
        raise ArgumentError(f"HL005: {of}({name}=...) takes a positive number; received {short(value)}.")
    return float(value)
