"""The house keeps its order: imports go one way, backends stay behind their contract, files stay small."""

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest

import handloom

pytestmark = pytest.mark.once

PACKAGE = Path(handloom.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
TESTS = Path(__file__).parent

# From the ground up. A module imports from its own layer and those below.
LAYERS = [
    {"errors", "_util"},
    {"_keras"},
    {"backends", "_interop"},
    {"distribute"},
    {"_trace"},
    {"optimizers"},
    {"_data", "_reporting", "callbacks", "checkpoint"},
    {"checks"},
    {"_run"},
    {"_model"},
    {"report", "recipes", "cli"},
]
# What may look inside Keras.
MAY_USE_INTERNALS = {"_keras"}

FILE_LINES, CLASS_LINES = 500, 380

every_file = pytest.mark.parametrize("name", FILES)


@functools.cache
def parsed(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def part(module):
    """The part of the package that a module belongs to: `backends` for `backends.jax`."""
    return module.split(".")[0]


def layer(module):
    [found] = [height for height, parts in enumerate(LAYERS) if part(module) in parts] or [None]
    return found


def imports(tree):
    """Everything that a file imports, anywhere in it, as (line, dotted name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import, which these tests do not follow"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported(name):
    """The modules of the package that a file imports; "" is the package itself."""
    ours = [dotted.split(".")[1:] for _, dotted in imports(parsed(name)) if part(dotted) == "handloom"]
    return {next((module for module in _prefixes(parts) if _is_module(module)), "") for parts in ours}


def _prefixes(parts):
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _is_module(name):
    return name in FILES or f"{name}.__init__" in FILES


def outside_backends():
    return [name for name in FILES if part(name) not in ("backends", "_interop") and name != "_util.backend_names"]


def docstrings(tree):
    """The nodes that are docstrings, or strings under an assignment that explain it."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


# ----------------------------------------------------------------------- layers


def test_every_module_has_its_layer_and_every_layer_its_modules():
    parts = {part(name) for name in FILES}
    assert set().union(*LAYERS) == parts
    assert sum(map(len, LAYERS)) == len(parts)


@every_file
def test_no_module_imports_from_a_layer_above(name):
    for module in imported(name):
        if module == "":
            assert layer(name) == len(LAYERS) - 1, f"{name} imports the whole package, which imports it"
        else:
            assert layer(module) <= layer(name), f"{name} imports {module}, which stands above it"


def test_no_imports_go_in_a_circle():
    graph = {name: {module if module in FILES else f"{module}.__init__" for module in imported(name)} for name in FILES}
    # The package itself imports by name, and late.
    graph = {name: modules - {".__init__"} for name, modules in graph.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_contributing_names_files_and_layers_that_exist():
    text = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:handloom/)?([\w/*]+\.py)`", text)
    assert len(named) > 20
    assert [path for path in named if not [*PACKAGE.glob(path), *TESTS.parent.glob(path)]] == []
    assert all(f"`{part}`" in text for parts in LAYERS for part in parts)


# --------------------------------------------------------------------- backends


@pytest.mark.parametrize("name", outside_backends())
def test_no_code_outside_backends_knows_which_backend_runs(name):
    tree, names = parsed(name), {"jax", "jnp", "tensorflow", "tf", "torch"}
    explaining = docstrings(tree)
    for line, dotted in imports(tree):
        assert part(dotted) not in names, f"{name}, line {line}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.arg)):
            assert (node.id if isinstance(node, ast.Name) else node.arg) not in names, f"{name}, line {node.lineno}"
        elif isinstance(node, ast.Constant) and id(node) not in explaining:
            assert node.value not in names, f"{name}, line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            asks = ast.unparse(node) in ("backend.name", "keras.backend.backend", "keras.config.backend")
            assert not asks or name == "_keras", f"{name}, line {node.lineno}"


def test_there_is_one_switch():
    asking = [
        name
        for name in FILES
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "keras.backend.backend"
    ]
    assert set(asking) == {"_keras", "backends.__init__"}  # The first refuses what is no backend of ours.


# -------------------------------------------------------------------- internals


def private(name):
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def own_names():
    """The private names that the package itself defines, as functions, classes, variables or attributes."""
    found = set()
    for name in FILES:
        for node in ast.walk(parsed(name)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self.__dict__":
                found |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    return {name for name in found if private(name)}


@pytest.mark.parametrize("name", [name for name in outside_backends() if name not in MAY_USE_INTERNALS])
def test_private_internals_of_others_are_used_only_where_they_are_listed(name):
    tree, own = parsed(name), own_names()
    for line, dotted in imports(tree):
        if part(dotted) != "handloom":
            assert not dotted.startswith("keras.src"), f"{name}, line {line}"
            assert not any(map(private, dotted.split("."))), f"{name}, line {line}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            assert node.attr in own, f"{name}, line {node.lineno}: {node.attr} is not ours"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            asked = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            assert not private(asked) or asked in own, f"{name}, line {node.lineno}: {asked} is not ours"


# ------------------------------------------------------------------------- size


@every_file
def test_files_and_classes_stay_small(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < CLASS_LINES, f"{node.name} has grown too large"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_every_test_file_has_a_test_and_says_what_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
