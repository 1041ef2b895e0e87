"""Figures as texts, and the numbers in them."""

import math
import re

FIGURE, REFUSAL = "figure", "refusal"  # What a test tells of its row.
_ONE = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
NUMBER = re.compile(rf"(?<![\w.]){_ONE}(?![\w])")
NUMBERS = re.compile(rf"(?<![\w.]){_ONE}(?: / {_ONE})*(?![\w])")  # Of one backend, or of each.


def blank(text):
    """A text without its numbers: what it tells of."""
    return NUMBER.sub("0", text)


def below(difference):
    """The power of ten that a difference does not reach; what is left of rounding, if anything, differs by machine."""
    return f"below 1e{math.floor(math.log10(max(difference, 1e-12))) + 1:d}"
