"""`docs/compatibility.md`, from the results of the cells."""

import collections
from typing import Any

from tools.compat.cells import BACKENDS, Cell
from tools.compat.environment import ROOT
from tools.compat.trial import PARTS

PAGE = ROOT / "docs" / "compatibility.md"
HEAD = """# Versions

Each line was run in an environment of its own, with the versions shown, on Linux. `make compat` generates this page:
`make compat CELLS="torch-2.14"` runs one environment again and keeps the other lines.

The columns count tests that passed: the internals of Keras that Handloom uses (`tests/test_keras.py`); rows B, D and E
and those of variables (`tests/rows/`); the same numbers compiled, eager, on all backends of the environment, and, where
it has PyTorch, in a loop in native PyTorch (`tests/test_parity.py`, once for all its backends); and runs that resume
bitwise identical (`tests/resume/`). The whole suite runs with the versions of the extra `dev`.

"""
COLUMNS = ["Environment", "Python", "Keras", "Backend", "Internals", "Rows", "Parity", "Resume", "Date"]
TAIL = """
A newer or older version than these warns once (HL911) and runs. `pip` installs the versions in `pyproject.toml`. The
nightly of Keras replaces Keras: `pip uninstall keras`, then `pip install --pre keras-nightly`.
"""


def write(results: dict[str, dict[str, Any] | None], cells: list[Cell]) -> None:
    """Writes the page from the results by name of the cell; `None` for a cell that has never run."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [line for cell in cells for line in _lines(cell, results[cell.name])]
    failed = [line for cell in cells for line in _failed(cell, results[cell.name])]
    failures = "\n## Failures\n\n" + "\n".join(failed) + "\n" if failed else ""
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    PAGE.write_text(HEAD + table + TAIL + failures, encoding="utf-8")


def _lines(cell: Cell, found: dict[str, Any] | None) -> list[list[str]]:
    if found is None or "not run" in found:
        wanted = ", ".join(f"{name} {version}".strip() for name, version in cell.packages.items())
        why = "not run" if found is None else f"not run: {found['not run']}"
        return [[cell.name, cell.python, "", wanted, why, "", "", "", "" if found is None else found["date"]]]
    versions, parity = found["versions"], found["backends"][cell.backends[0]]["parity"]
    return [
        [
            cell.name,
            versions["python"],
            versions["keras"],
            f"{BACKENDS[backend]} {versions[backend]}",
            *(_counted(parity if part == "parity" else of_parts[part]) for part in PARTS),
            found["date"],
        ]
        for backend, of_parts in found["backends"].items()
    ]


def _counted(part: dict[str, Any]) -> str:
    passed, failed = part["passed"], len(part["failed"])
    return f"{passed} passed" + (f", **{failed} failed**" if failed else "") if passed or failed else "not run"


def _failed(cell: Cell, found: dict[str, Any] | None) -> list[str]:
    """A line for each reason and backend, with the tests that failed for it."""
    of_backends, tests = (found or {"backends": {}})["backends"], collections.defaultdict(list)
    for backend, of_parts in of_backends.items():
        for test in (test for part in PARTS for test in of_parts[part]["failed"]):
            tests[backend, _why(cell, test)].append(f"`{test}`")
    return [f"- {cell.name}, {BACKENDS[backend]}{why}: {', '.join(names)}" for (backend, why), names in tests.items()]


def _why(cell: Cell, test: str) -> str:
    return "".join(f": {why.removesuffix('.')}" for part, why in cell.known.items() if part in test)
