"""Runs the chosen part of the suite in an environment; the results are kept as JSON, in `results/`."""

import datetime
import json
import os
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tools.compat.cells import Cell
from tools.compat.environment import FOLDER, ROOT, made, versions

# What depends on versions most, in a few minutes a backend.
PARTS = {
    "internals": ["tests/test_keras.py"],
    "rows": [f"tests/rows/test_{rows}.py" for rows in ("b_steps_in_fit", "d_gradients", "e_functions", "f_variables")],
    "parity": ["tests/test_parity.py"],
    "resume": [
        "tests/resume/test_bitwise.py::test_hl_fit_resumes_bitwise_with_several_models_and_validation_within_epochs",
        "tests/resume/test_bitwise.py::test_fit_resumed_with_more_epochs_continues_bitwise",
    ],
}
# Starts many processes, and depends on no version.
LEFT_OUT = "tests/test_keras.py::test_import_names_the_installed_or_supported_backends"


def tried(cell: Cell) -> dict[str, Any]:
    """Runs a cell; returns its results, which are also kept."""
    found: dict[str, Any] = {"date": str(datetime.date.today()), "backends": {}}
    try:
        python = made(cell)
    except RuntimeError as error:
        found["not run"] = str(error)
    else:
        found["versions"] = versions(python)
        for backend in cell.backends:
            found["backends"][backend] = _results(cell, python, backend)
            _keep(cell, found)
    _keep(cell, found)
    return found


def kept(cell: Cell) -> dict[str, Any] | None:
    """The results of the last run of a cell, if there was one."""
    file = _file(cell)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _keep(cell: Cell, found: dict[str, Any]) -> None:
    _file(cell).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _file(cell: Cell) -> Path:
    return Path(__file__).parent / "results" / f"{cell.name}.json"


def _results(cell: Cell, python: Path, backend: str) -> dict[str, Any]:
    """The results of each part on a backend, and the seconds that all of them took."""
    report, log = (FOLDER / f"{cell.name}-{backend}.{end}" for end in ("xml", "log"))
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "HANDLOOM_ONCE_ON": cell.backends[0],  # Parity is tested once for all backends of a cell.
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    options = ["-q", "--continue-on-collection-errors", f"--deselect={LEFT_OUT}", f"--junitxml={report}"]
    command = [python, "-m", "pytest", *options, *(file for part in PARTS.values() for file in part)]
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        subprocess.run(command, check=False, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    return {part: _counts(cases, part) for part in PARTS} | {"seconds": round(time.monotonic() - began)}


def _counts(cases: list[ET.Element], part: str) -> dict[str, Any]:
    modules = tuple(file.partition("::")[0].removesuffix(".py").replace("/", ".") for file in PARTS[part])
    ours = [case for case in cases if _name(case).startswith(modules)]
    failed = [case for case in ours if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in ours if case.find("skipped") is not None]
    return {"passed": len(ours) - len(failed) - len(skipped), "failed": sorted(map(_name, failed))}


def _name(case: ET.Element) -> str:
    return ".".join(filter(None, (case.get("classname"), case.get("name"))))
