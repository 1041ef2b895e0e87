"""Warnings of Handloom: given, silenced, collected, or turned into errors."""

import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from handloom._util.listeners import Listeners
from handloom._util.short import short
from handloom._util.source_line import users_frame
from handloom._util.switch import Switch
from handloom.errors import ArgumentError, Finding, HandloomError, HandloomWarning

_silenced: Switch[frozenset[str]] = Switch(frozenset())
_strict = Switch(False)
_collected: Switch[list[Finding] | None] = Switch(None)

_log = logging.getLogger("handloom")

given = Listeners()
"""Functions that are called with each finding of a warning that is not silenced."""


def warn(
    saw: str,
    why: str = "",
    fix: str = "",
    category: type[HandloomWarning] = HandloomWarning,
    at: tuple[str, int] | None = None,
) -> None:
    """Warns the user, at the line of their code that the warning is about.

    Args:
        saw: The code and what was seen: `"HL204: Something was seen."`
        why: Why it is wrong.
        fix: What to do instead.
        category: The class of the warning.
        at: File and line; by default those at which the user's code runs now.
    """
    if saw.partition(": ")[0] in _silenced.get():
        return
    frame = users_frame()
    place = at or (frame.f_code.co_filename, frame.f_lineno)
    warning = category(saw, why, fix, at=place)
    given.tell(warning.finding)
    if _strict.get():
        raise HandloomError(saw, why, fix, at=place)
    if (collected := _collected.get()) is not None:
        collected.append(warning.finding)
    else:
        registry = frame.f_globals.setdefault("__warningregistry__", {})
        warnings.warn_explicit(warning, category, *place, frame.f_globals.get("__name__"), registry)


def log(notice: HandloomWarning) -> None:
    """Logs something of which the user should know and which need not be a mistake: `strict` makes it no error."""
    if notice.finding.code not in _silenced.get():
        _log.warning("%s", notice)


def silence(code: str) -> contextlib.AbstractContextManager[None]:
    """Silences a warning: from now on, or, as a context manager, for a block of this thread.

    Args:
        code: The code of the warning, such as `"HL204"`. `docs/messages.md` lists all codes.

    Returns:
        The context manager.

    Raises:
        ArgumentError: There is no warning of that code.

    Example:
        `hl.checks.silence("HL204")`, or `with hl.checks.silence("HL204"): ...`
    """
    if code not in _codes():
        raise ArgumentError(
            f"HL001: hl.checks.silence takes the code of a warning, such as 'HL204'; received {short(code)}.",
            fix="docs/messages.md lists all codes. An error cannot be silenced.",
        )
    return _silenced.set(_silenced.get() | {code})


@functools.cache
def _codes() -> list[str]:
    """The codes of all warnings; `make messages` writes them."""
    return cast(list[str], json.loads(Path(__file__).with_name("messages.json").read_bytes())["warnings"])


def strict() -> contextlib.AbstractContextManager[None]:
    """Turns warnings into errors, `HandloomError`: from now on, or, as a context manager, for a block of this thread.

    Returns:
        The context manager.
    """
    return _strict.set(True)


@contextlib.contextmanager
def collect() -> Iterator[list[Finding]]:
    """Collects the findings of a block, instead of showing its warnings.

    Yields:
        A list that is filled while the block runs. If a `HandloomError` ends the block, its finding is the last.
    """
    findings: list[Finding] = []
    try:
        with _collected.here(findings):
            yield findings
    except HandloomError as error:
        findings.append(error.finding)
        raise
