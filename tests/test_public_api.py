"""What is public is what is listed, and only that."""

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import handloom as hl

pytestmark = pytest.mark.once

PACKAGE = Path(hl.__file__).parent
MODULES = ("callbacks", "checks", "distribute", "errors", "optimizers", "report")


def stub_names():
    """The names in `__init__.pyi`, each imported there as itself."""
    imports = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body
    aliases = [alias for node in imports for alias in node.names]
    assert all(alias.name == alias.asname for alias in aliases)
    return {alias.name for alias in aliases}


def test_the_public_names_are_those_of_the_contract():
    assert stub_names() == {
        *("value_and_grad", "grad", "jacobian", "hessian", "minimize"),
        *("function", "Function", "Trace", "run_eagerly"),
        *("Model", "Sequential", "fit", "Feed", "every", "Every", "set_random_seed"),
        *("Checkpointer", "load_checkpoint"),
        *("callbacks", "checks", "distribute", "errors", "optimizers", "report"),
    }


def test_what_the_stub_lists_is_what_the_package_shows():
    assert stub_names() == set(hl.__all__) == set(dir(hl))


@pytest.mark.parametrize("name", sorted(stub_names()))
def test_every_public_name_is_there_and_explains_itself(name):
    found = getattr(hl, name)
    assert inspect.getdoc(found)
    if not inspect.ismodule(found):
        assert found.__module__.startswith("handloom.")


def test_what_is_not_listed_is_not_there():
    with pytest.raises(AttributeError, match="nonsense"):
        hl.nonsense  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_shows_what_it_lists_and_nothing_else(name):
    module = importlib.import_module(f"handloom.{name}")
    shown = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert shown == set(module.__all__)
    assert all(inspect.getdoc(getattr(module, name)) for name in module.__all__)
    assert inspect.getdoc(module)


def test_every_module_is_public_by_contract_or_private_by_name():
    public = {path.stem for path in PACKAGE.iterdir() if path.name.endswith(".py") or (path / "__init__.py").exists()}
    public = {name for name in public if not name.startswith("_")}
    assert public == {*MODULES, "backends", "checkpoint", "cli", "recipes"}


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").is_file()


def test_importing_the_package_imports_no_backend_and_no_keras():
    code = "import sys, handloom; print(*{'keras', 'jax', 'tensorflow', 'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
