"""The virtual environment of a cell, made once by pip."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

from tools.compat.cells import BACKENDS, Cell

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "compat"

# What the tests that run import, from the extras of the project.
TESTS = {"hypothesis", "pandas", "pytest", "scikit-learn", "tensorboard", "tensorboardx"}


def made(cell: Cell) -> Path:
    """The Python of a cell's environment, which is made unless it is there.

    Raises:
        RuntimeError: It cannot be made; the message is the last line of pip, or names the missing Python.
    """
    folder, wanted = FOLDER / cell.name, _requirements(cell)
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.exists() or installed.read_text().splitlines() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        _run(_python(cell.python), "-m", "venv", folder)
        _pip(python, "--upgrade", "pip")
        _pip(python, *wanted)
        _pip(python, "--no-deps", "--editable", str(ROOT))
        if "keras-nightly" in cell.packages:  # Others have brought Keras, whose files the nightly replaces.
            _run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "keras", "keras-nightly")
            _pip(python, "--pre", "--no-deps", "keras-nightly" + cell.packages["keras-nightly"])
        installed.write_text("\n".join(wanted))
    return python


def _requirements(cell: Cell) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    needed = [requirement for requirement in project["dependencies"] if _name(requirement) != "keras"]
    needed += [requirement for requirement in extras if _name(requirement) in TESTS]
    tried = [name + version for name, version in cell.packages.items() if name != "keras-nightly"]
    return [*dict.fromkeys([*tried, *needed])]


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].lower()


def _python(version: str) -> str:
    """The interpreter of a version: that in a variable such as PYTHON_3_13, or that on the PATH."""
    variable, name = f"PYTHON_{version.replace('.', '_')}", f"python{version}"
    if found := os.environ.get(variable) or shutil.which(name):
        return found
    raise RuntimeError(f"{name} is not on the PATH; its path may stand in {variable}")


def _pip(python: Path, *arguments: str) -> None:
    _run(python, "-m", "pip", "install", "--quiet", *arguments)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or [done.stdout]
        raise RuntimeError(lines[-1].strip())


def versions(python: Path) -> dict[str, str]:
    """The versions of Python, Keras and the backends in an environment."""
    names = ["keras", "keras-nightly", *BACKENDS]
    code = (
        "import platform; from importlib.metadata import version, PackageNotFoundError\n"
        "print('python', platform.python_version())\n"
        f"for name in {names!r}:\n"
        "    try: print(name, version(name))\n"
        "    except PackageNotFoundError: pass"
    )
    lines = subprocess.run([python, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    return {name.removesuffix("-nightly"): version for name, version in map(str.split, lines)}
