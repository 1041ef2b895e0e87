"""Programs that run on every backend, each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from handloom._util.backend_names import BACKENDS

ROOT = Path(__file__).parents[1]


def started(backend: str, module: str, *arguments: Any, **pipes: int) -> subprocess.Popen[str]:
    """Starts `python -m MODULE ARGUMENTS` on a backend."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"},  # They share the cores.
        text=True,
        **pipes,
    )


def arrays_by_backend(module: str, folder: Path, *arguments: Any) -> dict[str, dict[str, np.ndarray]]:
    """Runs `python -m MODULE FILE ARGUMENTS` on all installed backends at once; returns the arrays in each FILE."""
    files = {backend: folder / f"{backend}.npz" for backend in BACKENDS if importlib.util.find_spec(backend)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = {backend: started(backend, module, file, *arguments, **pipes) for backend, file in files.items()}
    for backend, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"on {backend}:\n{output}"
    return {backend: dict(np.load(file)) for backend, file in files.items()}
