"""Warnings, and what becomes of them: shown, silenced, collected, or errors."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

from handloom._util.listeners import Listeners
from handloom._util.source_line import users_frame
from handloom._util.switch import Switch
from handloom.errors import ArgumentError, Finding, HandloomError, HandloomWarning

_silenced: Switch[frozenset[str]] = Switch(frozenset())
_strict = Switch(False)
_collected: ContextVar[list[Finding] | None] = ContextVar("collected", default=None)

given = Listeners()
"""Those that are told of each warning, whatever becomes of it."""


def warn(code: str, saw: str, why: str = "", fix: str = "", category: type[HandloomWarning] = HandloomWarning) -> None:
    """Warns the user, at the line of his that this is about.

    Args:
        code: The code of the message.
        saw: What was seen.
        why: Why it is wrong.
        fix: What to do instead.
        category: The class of the warning.
    """
    if code in _silenced.get():
        return
    frame = users_frame()
    place = frame.f_code.co_filename, frame.f_lineno
    warning = category(code, saw, why, fix, at=place)
    given.tell(warning.finding)
    collected = _collected.get()
    if _strict.get():
        raise HandloomError(code, saw, why, fix, at=place)
    if collected is not None:
        collected.append(warning.finding)
    else:
        registry = frame.f_globals.setdefault("__warningregistry__", {})
        warnings.warn_explicit(warning, category, *place, frame.f_globals.get("__name__"), registry)


def silence(code: str) -> contextlib.AbstractContextManager[None]:
    """Shows a warning no more: for good, or as a context manager for a block of this thread.

    Args:
        code: Its code, such as `"HL210"`.

    Returns:
        The context manager.

    Raises:
        ArgumentError: If it is no code.

    Example:
        `hl.checks.silence("HL210")`, or `with hl.checks.silence("HL210"): ...`
    """
    if not isinstance(code, str) or not re.fullmatch("HL[0-9]{3}", code):
        raise ArgumentError("HL001", f"hl.checks.silence takes a code such as 'HL210'; received {code!r}.")
    return _silenced.set(_silenced.get() | {code})


def strict() -> contextlib.AbstractContextManager[None]:
    """Makes Handloom's warnings errors, `HandloomError`: from now on, or for a block of this thread.

    Returns:
        The context manager.
    """
    return _strict.set(True)


@contextlib.contextmanager
def collect() -> Iterator[list[Finding]]:
    """Collects Handloom's warnings inside, instead of showing them, and the error that ends the block, if one does.

    Yields:
        The list of findings, filled while the block runs.
    """
    findings: list[Finding] = []
    token = _collected.set(findings)
    try:
        yield findings
    except HandloomError as error:
        findings.append(error.finding)
        raise
    finally:
        _collected.reset(token)
