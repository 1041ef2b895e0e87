"""Errors and warnings, by name."""

import builtins
import inspect
import re

import pytest

import handloom as hl
from handloom import errors

pytestmark = pytest.mark.once


def tree():
    """The tree in the docstring: (name, its parent or nothing, the built-in in parentheses or nothing)."""
    lines = re.findall(r"^([├└]── )?((?:\w+)(?:Error|Warning))(?: +\((\w+)[,)])?", errors.__doc__, re.MULTILINE)
    found, root = [], ""
    for branch, name, builtin in lines:
        root = root if branch else name
        found.append((name, root if branch else "", builtin))
    return found


def in_the_module():
    classes = inspect.getmembers(errors, inspect.isclass)
    ours = {name: cls for name, cls in classes if cls.__module__ == errors.__name__ and name in errors.__all__}
    return {name: cls for name, cls in ours.items() if name != "Finding"}


def test_the_docstring_names_exactly_the_classes():
    assert sorted(name for name, _, _ in tree()) == sorted(in_the_module())


@pytest.mark.parametrize(("name", "parent", "builtin"), tree())
def test_each_is_of_its_kind_and_the_builtin_that_programmers_expect(name, parent, builtin):
    cls = in_the_module()[name]
    assert issubclass(cls, in_the_module()[parent] if parent else Exception)
    assert issubclass(cls, getattr(builtins, builtin) if builtin else Exception)


def test_only_the_two_bases_have_no_builtin_of_their_own():
    assert [name for name, parent, builtin in tree() if not parent] == ["HandloomError", "HandloomWarning"]
    assert all(builtin for name, parent, builtin in tree() if parent == "HandloomError")


def test_warnings_are_for_users_and_no_errors():
    assert issubclass(errors.HandloomWarning, UserWarning)
    assert not issubclass(errors.HandloomWarning, errors.HandloomError)


def test_each_says_what_it_is():
    assert all(inspect.getdoc(cls).endswith(".") for cls in in_the_module().values())


def test_errors_are_found_from_the_package():
    assert hl.errors is errors


@pytest.mark.parametrize("name", in_the_module())
def test_an_error_takes_a_message(name):
    assert str(in_the_module()[name]("HL999", "Something is wrong.")) == "Something is wrong. [HL999]"
