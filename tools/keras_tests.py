"""Runs Keras's own tests, from where Keras is installed, on `keras.Model` and on `hl.Model`, and compares.

python -m tools.keras_tests [--backend B]... [FILE]...

A test that Keras passes and `hl.Model` fails must be in the table of departures, `docs/departures.toml`, and a test in
the table must fail: otherwise the exit status is 1. The outcomes on plain Keras are kept in build/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from docs.departures import ROOT, departures, expected

VERSION = importlib.metadata.version("keras")
KERAS = Path(str(importlib.util.find_spec("keras").submodule_search_locations[0])) / "src"
BUILD = ROOT / "build" / "keras_tests"
FILES = ("callbacks", "distillation", "legacy/saving", "models", "optimizers", "saving", "trainers", "wrappers")
BACKENDS = ("jax", "tensorflow", "torch")
USES_MODELS = re.compile(r"\b(Model|Sequential|Functional|Trainer)\b")
ADDRESS = re.compile(r"0x[0-9a-f]+")
"""Of an object in the name of a test, another in each process."""
LIMIT = 3600

PAGE = ROOT / "docs" / "keras_tests.md"
HEAD = f"""# Keras's own tests on hl.Model

Tests of Keras {VERSION} that make models, with `keras.Model`, `keras.Sequential` and functional models replaced by
those of Handloom: how many pass, of those that pass with Keras. Each one that does not is a departure on purpose, named
with its reason in [departures.md](departures.md). `make keras-tests` writes this page.
"""

Outcomes: TypeAlias = dict[str, dict[str, list[str]]]
"""By file and test: the outcome, and the last line of a failure."""

Count: TypeAlias = tuple[int, int, int]
"""Tests passed by Keras, of these by `hl.Model`, and departures."""


def run(files: list[str], backend: str, *plugins: str) -> Outcomes:
    """Runs test files of Keras in a process of their own."""
    if not files:
        return {}
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = BUILD / f"{backend}{'-'.join(plugins)}.jsonl"
    lines.write_text("")
    threads = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    environment = os.environ | threads | {"KERAS_BACKEND": backend, "OUTCOMES": str(lines)}
    quiet = ("-q", "--tb=short", "--continue-on-collection-errors", f"--rootdir={KERAS}", "-c", os.devnull)
    chosen = [part for plugin in ("no:cacheprovider", "tools.keras_outcomes", *plugins) for part in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", *quiet, *chosen, *(str(KERAS / file) for file in files)]
    with lines.with_suffix(".log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, cwd=BUILD, stdout=log, stderr=log, timeout=LIMIT, check=False)
    outcomes: Outcomes = {file: {} for file in files}
    for path, name, outcome, why in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
        outcomes[os.path.relpath(path, KERAS)][ADDRESS.sub("0x", name)] = [outcome, why]
    return outcomes


def on_keras(files: list[str], backend: str) -> Outcomes:
    """The outcomes on plain Keras; those known are not run again."""
    kept = BUILD / f"{backend}-keras-{VERSION}.json"
    known: Outcomes = json.loads(kept.read_text()) if kept.exists() else {}
    known |= run([file for file in files if file not in known], backend)
    kept.write_text(json.dumps(known))
    return {file: known[file] for file in files}


def compared(files: list[str], backend: str) -> tuple[dict[str, Count], list[str]]:
    """Compares the outcomes; returns the counts by file, and what contradicts the table of departures."""
    keras, ours = on_keras(files, backend), run(files, backend, "tools.keras_view")
    is_departure, counts, wrong = expected(departures(), backend), {}, []
    for file in files:
        passed = {test for test, (outcome, _) in keras[file].items() if outcome == "passed"}
        failed = {test for test in passed if ours[file].get(test, [""])[0] != "passed"}
        departs = {test for test in passed if is_departure(f"{file}::{test}")}
        counts[file] = len(passed), len(passed - failed), len(failed & departs)
        whys = {test: ours[file].get(test, ["", "did not end"])[1] for test in sorted(failed - departs)}
        wrong += [f"{backend}: {file}::{test}: {why}" for test, why in whys.items()]
        wrong += [f"{backend}: {file}::{test} is in the table, and passes" for test in sorted(departs - failed)]
    return counts, wrong


def table(files: list[str], counts: dict[str, dict[str, Count]]) -> str:
    """The counts as Markdown, a line a file."""
    sums = {backend: tuple(map(sum, zip(*by_file.values(), strict=True))) for backend, by_file in counts.items()}
    lines = [f"| Tests of Keras | {' | '.join(counts)} |", f"| --- |{' --- |' * len(counts)}"]
    lines += [f"| `{file}` | {' | '.join(_cell(*by_file[file]) for by_file in counts.values())} |" for file in files]
    return "\n".join([*lines, f"| all | {' | '.join(_cell(*total) for total in sums.values())} |"])


def _cell(passed: int, ours: int, departures: int) -> str:
    return f"{ours} of {passed}" + f", {departures} depart" * bool(departures)


def main() -> int:
    """Prints the table of counts, then what contradicts the table of departures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--backend", action="append")
    given = parser.parse_args()
    files, backends = _files(given.files), given.backend or BACKENDS
    results = {backend: compared(files, backend) for backend in backends}
    shown = table(files, {backend: counts for backend, (counts, _) in results.items()})
    wrong = [line for _, lines in results.values() for line in lines]
    print(shown, *wrong, sep="\n")
    _write_page({backend: counts for backend, (counts, _) in results.items()})
    return bool(wrong)


def _files(names: Sequence[str]) -> list[str]:
    """The test files, also in folders, that make models; a path elsewhere than in Keras stays what it is."""
    roots = [KERAS / name for name in names]
    paths = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*_test.py")))]
    return [os.path.relpath(path, KERAS) for path in paths if USES_MODELS.search(path.read_text(encoding="utf-8"))]


def _write_page(counts: dict[str, dict[str, Count]]) -> None:
    """Writes the page once all files have run on all backends, be it in parts."""
    kept = BUILD / "counts.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    known = {backend: known.get(backend, {}) | counts.get(backend, {}) for backend in BACKENDS}
    kept.write_text(json.dumps(known))
    files = _files(FILES)
    if all(file in by_file for by_file in known.values() for file in files):
        whole = {backend: {file: by_file[file] for file in files} for backend, by_file in known.items()}
        PAGE.write_text(f"{HEAD}\n{table(files, whole)}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
