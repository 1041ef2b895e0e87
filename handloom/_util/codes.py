"""The code of functions, read for the names in it."""

import types
from collections.abc import Iterator
from typing import Any


def codes_of(function: Any) -> Iterator[types.CodeType]:
    """The code of a function, and that of the functions inside it; nothing for what is not written in Python."""
    codes = [getattr(function, "__code__", None)]
    for code in codes:
        if isinstance(code, types.CodeType):
            yield code
            codes.extend(code.co_consts)
