"""Values in messages."""

from typing import Any


def short(value: Any) -> str:
    """A value as a short text: of an array its shape, of all others at most 60 characters."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a tensor of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
