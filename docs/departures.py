"""Writes the page of departures, `docs/departures.md`, from their table, `docs/departures.toml`.

python docs/departures.py
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

HEAD = """# Departures from Keras

`hl.Model` is a `keras.Model`: what is not on this page is as in Keras. Each difference below is on purpose. It names
the tests of Handloom that hold it and, where there are some, the tests of Keras itself that show it: `make keras-tests`
runs Keras's own tests on `hl.Model`, and fails if any other test fails, or one of these passes;
[keras_tests.md](keras_tests.md) has the counts.

This page is generated from `docs/departures.toml`: `make departures`.
"""

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "docs" / "departures.toml", ROOT / "docs" / "departures.md"


@dataclasses.dataclass(frozen=True)
class Departure:
    """Something in which `hl.Model` differs from `keras.Model` on purpose.

    Attributes:
        topic: The section of the page.
        keras: What `keras.Model` does.
        ours: What `hl.Model` does.
        why: The reason.
        tests: Tests of Handloom that hold it, as `file::test`.
        shown: Tests of Keras that show it, as patterns of `file::Class::test`, with the backends where they do.
    """

    topic: str
    keras: str
    ours: str
    why: str
    tests: Sequence[str] = ()
    shown: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def departures() -> list[Departure]:
    """The table."""
    return [Departure(**row) for row in tomllib.loads(TABLE.read_text(encoding="utf-8"))["departure"]]


def expected(rows: Sequence[Departure], backend: str) -> Callable[[str], bool]:
    """A function that tells whether a test of Keras is in the table for a backend."""
    patterns = [test for row in rows for test, backends in row.shown.items() if backend in backends]
    return lambda test: any(fnmatch.fnmatchcase(test, pattern) for pattern in patterns)


def page(rows: Sequence[Departure]) -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for topic in dict.fromkeys(row.topic for row in rows):
        lines += [f"## {topic}", ""]
        lines += [line for row in rows if row.topic == topic for line in _lines(row)]
    return "\n".join(lines)


def _lines(row: Departure) -> list[str]:
    tests = [f"`{test}`" for test in row.tests]
    shown = [f"`{test}` ({', '.join(backends)})" for test, backends in row.shown.items()]
    return [
        f"- **Keras**: {row.keras}",
        f"- **Handloom**: {row.ours}",
        f"- Why: {row.why}",
        *(f"- {title}: {', '.join(names)}" for title, names in (("Held by", tests), ("In Keras", shown)) if names),
        "",
    ]


if __name__ == "__main__":
    PAGE.write_text(page(departures()), encoding="utf-8")
