"""A version of another library that Handloom was not tested with causes a warning, once."""

import re

from handloom._util.findings import warn


def warn_if_untested(name: str, version: str, lowest: str, highest: str) -> None:
    """Warns if a version is not from `lowest` to `highest`, both with two numbers: `"3.13"`."""
    if not _numbers(lowest) <= _numbers(version) <= _numbers(highest):
        warn(
            f"HL911: Handloom was tested with {name} {lowest} to {highest}; this is {name} {version}.",
            "It may work, but parts of Handloom depend on the version.",
            f"If something fails, use {name} {lowest} to {highest}.",
        )


def _numbers(version: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", version)[:2]))
