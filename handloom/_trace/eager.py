"""Whether steps run eagerly."""

from __future__ import annotations

import contextlib

from handloom._util.switch import Switch
from handloom.errors import ArgumentError

_eager = Switch(False)

runs_eagerly = _eager.get
"""Whether steps that this thread runs are run eagerly."""

eagerly = _eager.here
"""Steps that this thread runs inside run eagerly, or are compiled."""


def run_eagerly(value: bool) -> contextlib.AbstractContextManager[None]:
    """Makes every step and compiled function run eagerly from now on, so that `print` and `pdb` work in it.

    Args:
        value: `True` to run eagerly, `False` to compile again.

    Returns:
        A context manager, for a block: inside, the same holds for this thread only; outside, what held before.

    Raises:
        ArgumentError: If it is neither.

    Example:
        `hl.run_eagerly(True)` until further notice, or `with hl.run_eagerly(True): ...` for a block.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"HL002: hl.run_eagerly takes True or False; received {value!r}.")
    return _eager.set(value)
