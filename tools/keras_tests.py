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
from pathlib import Path
from typing import TypeAlias

from docs.departures import ROOT, departures, expected

KERAS = Path(str(importlib.util.find_spec("keras").submodule_search_locations[0])) / "src"
BUILD = ROOT / "build" / "keras_tests"
FILES = ("callbacks", "distillation", "legacy/saving", "models", "optimizers", "saving", "trainers", "wrappers")
USES_MODELS = re.compile(r"\b(Model|Sequential|Functional|Trainer)\b")
LIMIT = 3600

Outcomes: TypeAlias = dict[str, dict[str, list[str]]]
"""By file and test: the outcome, and the last line of a failure."""


def run(files: list[str], backend: str, *plugins: str) -> Outcomes:
    """Runs test files of Keras in a process of their own."""
    if not files:
        return {}
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = BUILD / f"{backend}{'-'.join(plugins)}.jsonl"
    lines.write_text("")
    threads = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    environment = os.environ | threads | {"KERAS_BACKEND": backend, "OUTCOMES": str(lines)}
    quiet = ("-q", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={KERAS}")
    chosen = [part for plugin in ("tools.keras_outcomes", *plugins) for part in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", *quiet, *chosen, *(str(KERAS / file) for file in files)]
    with lines.with_suffix(".log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, cwd=BUILD, stdout=log, stderr=log, timeout=LIMIT, check=False)
    outcomes: Outcomes = {file: {} for file in files}
    for test, outcome, why in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
        file, _, name = test.partition("::")
        outcomes[file][name] = [outcome, why]
    return outcomes


def on_keras(files: list[str], backend: str) -> Outcomes:
    """The outcomes on plain Keras; those known are not run again."""
    kept = BUILD / f"{backend}-keras-{importlib.metadata.version('keras')}.json"
    known: Outcomes = json.loads(kept.read_text()) if kept.exists() else {}
    known |= run([file for file in files if file not in known], backend)
    kept.write_text(json.dumps(known))
    return {file: known[file] for file in files}


def compared(files: list[str], backend: str) -> list[str]:
    """Prints a line for each file and each difference; returns what contradicts the table."""
    keras, ours = on_keras(files, backend), run(files, backend, "tools.keras_view")
    table = expected(departures(), backend)
    wrong = []
    for file in files:
        passed = {test for test, (outcome, _) in keras[file].items() if outcome == "passed"}
        failed = {test for test in passed if ours[file].get(test, [""])[0] != "passed"}
        known = {test for test in passed if table(f"{file}::{test}")}
        print(f"| {file} | {backend} | {len(passed)} | {len(passed) - len(failed)} | {len(failed & known)} |")
        whys = {test: ours[file].get(test, ["", "did not end"])[1] for test in sorted(failed - known)}
        wrong += [f"{backend}: {file}::{test}: {why}" for test, why in whys.items()]
        wrong += [f"{backend}: {file}::{test} is in the table, and passes" for test in known - failed]
    return wrong


def main() -> int:
    """Prints the table, then what contradicts the table of departures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--backend", action="append")
    given = parser.parse_args()
    roots = [KERAS / file for file in given.files]  # A path elsewhere stays what it is.
    paths = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*_test.py")))]
    files = [os.path.relpath(path, KERAS) for path in paths if USES_MODELS.search(path.read_text(encoding="utf-8"))]
    print("| file | backend | passed by keras.Model | of these by hl.Model | departures |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    wrong = [line for backend in given.backend or ("jax", "tensorflow", "torch") for line in compared(files, backend)]
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
