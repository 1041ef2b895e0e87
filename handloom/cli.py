"""The command line. It imports no backend until a command needs one, so that `handloom --help` answers at once."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click

from handloom.checkpoint.retention import OF_RUN
from handloom.errors import HandloomError, RecipeError

_BACKENDS = ("jax", "tensorflow", "torch")
_RECIPES = Path(__file__).parent / "recipes"
_RECORD = "run.json"


class _Group(click.Group):
    """Shows Handloom's own errors as a sentence, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except HandloomError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="handloom")
def main() -> None:
    """Write the training step by hand. Handloom does the rest, on TensorFlow, JAX and PyTorch."""


@main.command("list")
def list_recipes() -> None:
    """Name the recipes."""
    width = max(map(len, _recipes()))
    for name, path in _recipes().items():
        click.echo(f"{name:{width}}  {_first_line(path)}")


@main.command()
@click.argument("recipe", metavar="NAME|FILE.py")
@click.option("--backend", type=click.Choice(_BACKENDS), help="By default $KERAS_BACKEND, or what is installed.")
@click.option("--epochs", type=click.IntRange(min=1), help="By default the recipe's own number.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="By default runs/NAME-BACKEND.")
@click.option("--fresh", is_flag=True, help="Empty the run directory of the run that is in it.")
def run(recipe: str, backend: str | None, epochs: int | None, run_dir: Path | None, fresh: bool) -> None:
    """Run a recipe by name, or from a file.

    A file of your own has a function main(run_dir, epochs=...), as the recipes have; what it returns is shown.
    """
    path = _recipe_file(recipe)
    backend = _choose_backend(backend)
    click.echo(f"{recipe} on {backend}")
    function = _main_of(path)  # First, so that an older run is not removed for one that cannot begin.
    run_dir = _prepared(run_dir, f"{path.stem.replace('_', '-')}-{backend}", fresh)
    begun = time.perf_counter()
    result = function(run_dir, **({} if epochs is None else {"epochs": epochs}))
    seconds = time.perf_counter() - begun
    record = {"recipe": recipe, "backend": backend, "seconds": round(seconds, 1), "result": result}
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    (run_dir / _RECORD).write_text(text + "\n", encoding="utf-8")
    click.echo(f"{result or 'Done.'}\nIn {seconds:.0f} s. Everything is in {run_dir}{os.sep}: {_contents(run_dir)}")


@main.group(cls=_Group)
def checkpoint() -> None:
    """List, verify and show checkpoints."""


_where = click.argument("path", metavar="DIR", type=click.Path(exists=True, path_type=Path))


@checkpoint.command("ls")
@_where
def list_checkpoints(path: Path) -> None:
    """List the checkpoints in a directory, or of a run, oldest first."""
    for line in _inspect().listed(path):
        click.echo(line)


@checkpoint.command()
@_where
def verify(path: Path) -> None:
    """Read every byte of the checkpoints in a directory, or of one.

    What is damaged is named, and the exit code is then 1.
    """
    whole = True
    for good, line in _inspect().verified(path):
        click.echo(line)
        whole = whole and good
    if not whole:
        sys.exit(1)


@checkpoint.command()
@_where
def show(path: Path) -> None:
    """Show what is in a checkpoint, or in the newest of a directory."""
    for line in _inspect().shown(path):
        click.echo(line)


def _inspect() -> ModuleType:
    return importlib.import_module("handloom.checkpoint.inspection")  # Late, as it needs NumPy.


def _recipes() -> dict[str, Path]:
    files = sorted(path for path in _RECIPES.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in files}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _recipe_file(recipe: str) -> Path:
    if recipe.endswith(".py"):
        if not Path(recipe).is_file():
            raise RecipeError(f"HL906: There is no file {recipe}.")
        return Path(recipe)
    recipes = _recipes()
    if recipe not in recipes:
        near = difflib.get_close_matches(recipe, recipes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(recipes)}."
        raise RecipeError(
            f"HL907: There is no recipe {recipe!r}; {hint} For a file of your own, give its path: {recipe}.py"
        )
    return recipes[recipe]


def _choose_backend(backend: str | None) -> str:
    """Sets the backend for Keras, which reads it when it is first imported."""
    installed = [name for name in _BACKENDS if importlib.util.find_spec(name)]
    backend = backend or os.environ.get("KERAS_BACKEND") or _configured(installed)
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # It would greet with lines about the processor.
    if backend not in installed:
        importlib.import_module("handloom._keras")  # Raises the error that says what to install, or to choose.
    return backend


def _configured(installed: list[str]) -> str:
    """The backend that Keras is configured for, if it is there; else the first that is."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    try:
        configured = json.loads((home / "keras.json").read_text(encoding="utf-8")).get("backend")
    except (OSError, ValueError):
        configured = None
    if configured in installed:
        return str(configured)
    return installed[0] if installed else _BACKENDS[0]


def _prepared(run_dir: Path | None, name: str, fresh: bool) -> Path:
    """The run directory, made: the one asked for, whose run goes on if there is one, or the first that is free."""
    chosen = run_dir or Path("runs") / name
    saved = (chosen / OF_RUN).is_dir()
    if fresh and (saved or (chosen / _RECORD).exists()):
        _empty(chosen)
    if _in_use(chosen) and not (saved and run_dir is not None):
        if run_dir is not None:
            what = "a run; --fresh empties it" if (chosen / _RECORD).exists() else "files that are of no finished run"
            raise RecipeError(f"HL908: {chosen} holds {what}. Choose another directory with --run-dir.")
        chosen = next(path for number in range(2, 10**6) if not _in_use(path := Path("runs") / f"{name}-{number}"))
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def _empty(run_dir: Path) -> None:
    """Removes what is in a directory; itself it stays, as it may be where the user stands, or a link."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _in_use(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _main_of(path: Path) -> Callable[..., str | None]:
    module = _imported(path)
    function = getattr(module, "main", None)
    if not callable(function):
        raise RecipeError(f"HL909: {path} has no function main(run_dir, epochs=...) for handloom to run.")
    recipe: Callable[..., str | None] = function
    return recipe


def _imported(path: Path) -> ModuleType:
    if path.parent == _RECIPES:
        _check_extras()
        return importlib.import_module(f"handloom.recipes.{path.stem}")
    sys.path.insert(0, str(path.parent.resolve()))  # So that the file finds its neighbours, as under `python FILE.py`.
    # Not by its name, which another module may have, or which may not be one.
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None  # The name ends in .py.
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # Where Keras and pickle look for the classes in it.
    spec.loader.exec_module(module)
    return module


def _check_extras() -> None:
    """Now, not when the first curve is drawn, after training."""
    missing = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f'HL910: The recipes need {" and ".join(missing)}, not installed here: pip install "handloom[recipes]".'
        )


def _contents(run_dir: Path) -> str:
    return ", ".join(sorted(path.name + (os.sep if path.is_dir() else "") for path in run_dir.iterdir()))
