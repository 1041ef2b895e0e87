"""`hl.run_eagerly`."""

import contextlib

from handloom._util.short import short
from handloom._util.switch import Switch
from handloom.errors import ArgumentError

_eager = Switch(False)

runs_eagerly = _eager.get
"""Whether steps run eagerly in the caller's context."""

eagerly = _eager.here
"""Makes the steps of a block of this thread run eagerly, or compiled."""


def run_eagerly(value: bool) -> contextlib.AbstractContextManager[None]:
    """Makes every step and compiled function run eagerly from now on, so that `print` and `pdb` work in it.

    On JAX, Python cannot read values inside a differentiated function, such as that given to `hl.minimize`, in eager
    execution either: return them with `has_aux=True`, or use `jax.debug.print`.

    Args:
        value: `True` to run eagerly, `False` to compile.

    Returns:
        A context manager. If it is used, the setting holds only inside its block, and only for this thread.

    Raises:
        ArgumentError: `value` is neither `True` nor `False`.

    Example:
        `hl.run_eagerly(True)` for the whole process, or `with hl.run_eagerly(True): ...` for a block.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"HL002: hl.run_eagerly takes True or False; received {short(value)}.")
    return _eager.set(value)
