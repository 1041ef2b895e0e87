"""Figures as texts, and the numbers in them."""

import math
import re

FIGURE, REFUSAL = "figure", "refusal"  # The properties that a test records about its row.
_ONE = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
NUMBER = re.compile(rf"(?<![\w.]){_ONE}(?![\w])")
NUMBERS = re.compile(rf"(?<![\w.]){_ONE}(?: / {_ONE})*(?![\w])")  # One number, or one for each backend.


def blank(text):
    """A text with all its numbers replaced by 0."""
    return NUMBER.sub("0", text)


def below(difference):
    """The next power of ten above a difference; the exact difference is rounding, which varies by machine."""
    return f"below 1e{math.floor(math.log10(max(difference, 1e-12))) + 1:d}"
