"""Whether steps run eagerly: everywhere from now on, or in a block of one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_everywhere = False
_here: ContextVar[bool | None] = ContextVar("here", default=None)


def runs_eagerly() -> bool:
    """Whether steps that this thread runs are run eagerly."""
    here = _here.get()
    return _everywhere if here is None else here


@contextlib.contextmanager
def eagerly(value: bool) -> Iterator[None]:
    """Steps that this thread runs inside run eagerly, or are compiled."""
    token = _here.set(value)
    try:
        yield
    finally:
        _here.reset(token)


def run_eagerly(value: bool) -> contextlib.AbstractContextManager[None]:
    """Makes every step and compiled function run eagerly from now on, so that `print` and `pdb` work in it.

    Args:
        value: `True` to run eagerly, `False` to compile again.

    Returns:
        A context manager, for a block: inside, the same holds for this thread only; outside, what held before.

    Raises:
        TypeError: If it is neither.

    Example:
        `hl.run_eagerly(True)` until further notice, or `with hl.run_eagerly(True): ...` for a block.
    """
    global _everywhere
    if not isinstance(value, bool):
        raise TypeError(f"hl.run_eagerly takes True or False; received {value!r}.")
    before, here = _everywhere, _here.get()
    _everywhere = value
    if here is not None:
        _here.set(value)
    return _for_a_block(value, before, here)


@contextlib.contextmanager
def _for_a_block(value: bool, before: bool, here: bool | None) -> Iterator[None]:
    global _everywhere
    _everywhere = before
    _here.set(here)
    with eagerly(value):
        yield
