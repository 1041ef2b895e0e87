"""The command line. It imports no backend until a command needs one, so that `handloom --help` answers at once."""

import ast
import difflib
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import click

from handloom._interop.quiet_tensorflow import quiet_tensorflow
from handloom._util.backend_names import BACKENDS, OF_KERAS, missing_backend
from handloom.checkpoint.retention import OF_RUN
from handloom.errors import HandloomError, RecipeError

_RECIPES = Path(__file__).parent / "recipes"
_RECORD = "run.json"


class _Group(click.Group):
    """Shows errors of Handloom as a message, without a traceback."""

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
    """List the recipes."""
    recipes = _recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        click.echo(f"{name:{width}}  {docstring.splitlines()[0]}")


@main.command()
@click.argument("recipe", metavar="NAME|FILE.py")
@click.option("--backend", type=click.Choice(BACKENDS), help="Default: $KERAS_BACKEND, or that of Keras.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the number of epochs of the recipe.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Default: runs/NAME-BACKEND.")
@click.option("--fresh", is_flag=True, help="Remove the run that is in the run directory.")
def run(recipe: str, backend: str | None, epochs: int | None, run_dir: Path | None, fresh: bool) -> None:
    """Run a recipe by name, or from a file.

    Like a recipe, the file must have a function main(run_dir, epochs=...). Its result is printed.
    """
    path = _recipe_file(recipe)
    backend, reason = _choose_backend(backend)
    click.echo(f"{recipe} on {backend} ({reason})")
    function = _main_of(path)  # First, so that no run is removed for a file that cannot be imported.
    run_dir = _prepared(run_dir, f"{path.stem.replace('_', '-')}-{backend}", fresh)
    started = time.perf_counter()
    result = function(run_dir, **({} if epochs is None else {"epochs": epochs}))
    seconds = time.perf_counter() - started
    record = {"recipe": recipe, "backend": backend, "seconds": round(seconds, 1), "result": result}
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
    (run_dir / _RECORD).write_text(text, encoding="utf-8")
    contents = ", ".join(sorted(path.name + (os.sep if path.is_dir() else "") for path in run_dir.iterdir()))
    click.echo(f"{result or 'Done.'}\nIn {seconds:.0f} s. Results are in {run_dir}{os.sep}: {contents}")


@main.group()
def checkpoint() -> None:
    """List, verify and show checkpoints."""


_where = click.argument("path", metavar="DIR", type=click.Path(exists=True, path_type=Path))


@checkpoint.command("ls")
@_where
def list_checkpoints(path: Path) -> None:
    """List the checkpoints in a directory, or of a run, oldest first."""
    click.echo("\n".join(_inspection().listed(path)))


@checkpoint.command()
@_where
def verify(path: Path) -> None:
    """Read every byte of the checkpoints in a directory, or of one checkpoint.

    Damaged checkpoints are named; the exit code is then 1.
    """
    all_whole = True
    for whole, line in _inspection().verified(path):
        click.echo(line)
        all_whole = all_whole and whole
    if not all_whole:
        sys.exit(1)


@checkpoint.command()
@_where
def show(path: Path) -> None:
    """Show the contents of a checkpoint, or of the newest in a directory."""
    click.echo("\n".join(_inspection().shown(path)))


def _inspection() -> ModuleType:
    return importlib.import_module("handloom.checkpoint.inspection")  # Late, because it needs NumPy.


def _recipes() -> dict[str, Path]:
    return {path.stem.replace("_", "-"): path for path in sorted(_RECIPES.glob("[!_]*.py"))}


def _recipe_file(recipe: str) -> Path:
    if recipe.endswith(".py"):
        if not Path(recipe).is_file():
            raise RecipeError(f"HL906: There is no file {recipe}.")
        return Path(recipe)
    recipes = _recipes()
    if recipe not in recipes:
        near = difflib.get_close_matches(recipe, recipes, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The recipes are {', '.join(recipes)}."
        raise RecipeError(f"HL907: There is no recipe {recipe!r}.", fix=f"{hint} To run a file, type {recipe}.py.")
    return recipes[recipe]


def _choose_backend(backend: str | None) -> tuple[str, str]:
    """Sets the backend for Keras, which reads it when it is first imported. Returns it, and where it comes from."""
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    backend, reason = (backend, "chosen by --backend") if backend else _default_backend(installed)
    os.environ["KERAS_BACKEND"] = backend
    quiet_tensorflow(backend)
    if backend in BACKENDS and backend not in installed:
        raise missing_backend(backend, "--backend ")
    return backend, reason


def _default_backend(installed: list[str]) -> tuple[str, str]:
    """The backend that Keras takes, if it is installed; otherwise the first that is."""
    if in_environment := os.environ.get("KERAS_BACKEND"):
        return in_environment, "set by KERAS_BACKEND"
    path = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
    try:
        configured, reason = json.loads(path.read_text(encoding="utf-8"))["backend"], f"set in {path}"
    except (OSError, ValueError, LookupError):
        # Keras writes its default into the file when it is first imported: the second run must not differ.
        configured, reason = OF_KERAS, "the default of Keras; choose with --backend"
    if configured in installed:
        return configured, reason
    return next(iter(installed), BACKENDS[0]), "the first that is installed; choose with --backend"


def _prepared(run_dir: Path | None, name: str, fresh: bool) -> Path:
    """Creates the run directory: the given one, whose run resumes if it has checkpoints, or the first unused one."""
    chosen = run_dir or Path("runs") / name
    resumes, is_run = (chosen / OF_RUN).is_dir(), (chosen / _RECORD).exists()
    if fresh and (resumes or is_run):
        _empty(chosen)
    elif _in_use(chosen) and run_dir is None:
        numbered = (Path("runs") / f"{name}-{number}" for number in itertools.count(2))
        pairs = itertools.pairwise(itertools.chain([chosen], numbered))
        earlier, chosen = next((used, path) for used, path in pairs if not _in_use(path))
        resume = f" To resume the earlier one, pass --run-dir {earlier}." if (earlier / OF_RUN).is_dir() else ""
        click.echo(f"This run is a new one, in {chosen}.{resume}")
    elif _in_use(chosen) and not resumes:
        raise RecipeError(
            f"HL908: {chosen} holds {'a finished run' if is_run else 'files that do not belong to a run'}.",
            fix="Choose another directory with --run-dir"
            f"{', or pass --fresh to remove the run in it' if is_run else ''}.",
        )
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def _empty(run_dir: Path) -> None:
    """Removes the contents of a directory. The directory stays: it may be the current one, or a link."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _in_use(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _main_of(path: Path) -> Callable[..., str | None]:
    function: Callable[..., str | None] | None = getattr(_imported(path), "main", None)
    if not callable(function):
        raise RecipeError(f"HL909: {path} has no function main.", fix="Define main(run_dir, epochs=...) in it.")
    return function


def _imported(path: Path) -> ModuleType:
    if path.parent == _RECIPES:
        _check_extras()
        return importlib.import_module(f"handloom.recipes.{path.stem}")
    sys.path.insert(0, str(path.parent.resolve()))  # So that the file finds its neighbours, as under `python FILE.py`.
    # Not by its name, which another module may have, or which may not be a module name.
    module = ModuleType(path.stem)
    module.__file__ = str(path.resolve())
    sys.modules.setdefault(path.stem, module)  # Where Keras and pickle look for the classes in it.
    SourceFileLoader(path.stem, module.__file__).exec_module(module)
    return module


def _check_extras() -> None:
    """Checks for the libraries of the recipes before training, and not when the first curve is drawn."""
    missing = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"HL910: The recipes need what is not installed: {' and '.join(missing)}.",
            fix='Install the extra: pip install "handloom[recipes]".',
        )
