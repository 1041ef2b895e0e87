"""Warnings that point at the user's line, not at ours."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

from handloom.errors import HandloomWarning

_PACKAGE = str(Path(__file__).parents[1])


def warn(message: str, category: type[Warning] = HandloomWarning) -> None:
    """Warns at the innermost line that is not Handloom's own."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
