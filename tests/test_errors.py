"""The classes of errors and warnings, and the tree of them in the docstring of `handloom.errors`."""

import builtins
import inspect
import re

import pytest

import handloom as hl
from handloom import errors

pytestmark = pytest.mark.once

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if name in errors.__all__ and name != "Finding"
}


def tree():
    """The tree in the docstring: (name, parent or "", built-in in parentheses or "")."""
    lines = re.findall(r"^([├└]── )?((?:\w+)(?:Error|Warning))(?: +\((\w+)[,)])?", errors.__doc__, re.MULTILINE)
    found, root = [], ""
    for branch, name, builtin in lines:
        root = root if branch else name
        found.append((name, root if branch else "", builtin))
    return found


def test_errors_docstring_names_exactly_the_classes():
    assert sorted(name for name, _, _ in tree()) == sorted(CLASSES)
    assert all(inspect.getdoc(cls).endswith(".") for cls in CLASSES.values())
    assert hl.errors is errors


@pytest.mark.parametrize(("name", "parent", "builtin"), tree())
def test_errors_have_their_parent_and_the_expected_builtin_and_take_a_message(name, parent, builtin):
    cls = CLASSES[name]
    assert issubclass(cls, CLASSES[parent] if parent else Exception)
    assert issubclass(cls, getattr(builtins, builtin) if builtin else Exception)
    assert str(cls("HL999", "Something is wrong.")) == "Something is wrong. [HL999]"


def test_errors_without_a_builtin_are_the_two_bases():
    assert [name for name, parent, builtin in tree() if not parent] == ["HandloomError", "HandloomWarning"]
    assert all(builtin for name, parent, builtin in tree() if parent == "HandloomError")
    assert issubclass(errors.HandloomWarning, UserWarning)
    assert not issubclass(errors.HandloomWarning, errors.HandloomError)
