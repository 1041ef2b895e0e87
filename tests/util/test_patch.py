"""Patches: attributes are replaced for the code that enters them, and restored afterwards."""

import types

import pytest

from handloom._util.patch import Patch
from tests.threads import alternating, in_a_thread

pytestmark = pytest.mark.once


class Base:
    """A class of another library."""

    size = types.SimpleNamespace(unit="metre")

    def name(self):
        return "base"

    @property
    def value(self):
        """Its value."""
        return 1


class Derived(Base):
    """Inherits all attributes."""


def louder(original):
    return lambda *args: f"{original(*args)}!"


def attributes():
    return [vars(cls).get(name) for cls in (Base, Derived) for name in ("name", "value", "size")]


PATCH = Patch(
    (Base, "name", louder),
    (Derived, "value", lambda getter: lambda self: getter(self) + 10),
    (Base, "size", lambda _: types.SimpleNamespace(unit="foot")),
)


def seen():
    return Base().name(), Derived().value, Base().value, Base.size.unit


PATCHED, ORIGINAL = ("base!", 11, 1, "foot"), ("base", 1, 1, "metre")


def test_patch_replaces_methods_properties_and_objects_and_restores_the_same_ones():
    before = attributes()
    with PATCH:
        assert seen() == PATCHED
        with pytest.raises(KeyError), PATCH:  # It may be entered again, and left by an error.
            raise KeyError
        assert seen() == PATCHED
        assert Derived.value.__doc__ == "Its value."
    assert seen() == ORIGINAL
    assert all(now is then for now, then in zip(attributes(), before, strict=True))


def size():
    return 1


def test_patch_of_code_changes_a_function_wherever_it_was_imported():
    imported, code = size, size.__code__
    with Patch((size, "__code__", lambda original: eval(f"lambda: {original()} + 10"))):
        assert imported() == size() == 11
    assert imported() == 1
    assert size.__code__ is code


def test_patch_decorates_a_function_that_calls_itself():
    @PATCH
    def count(n):
        return [Base().name(), *count(n - 1)] if n else []

    assert count(3) == ["base!"] * 3
    assert Base().name() == "base"


def test_patch_leaves_other_threads_the_original():
    with PATCH:
        assert in_a_thread(seen) == ORIGINAL


def test_patch_serves_two_threads_that_overlap_and_restores_the_original():
    """A in, B in, A out, B out: a stack of replacements would leave that of A behind, and none for B."""
    before, found = attributes(), []

    def one():
        with PATCH:
            found.append(seen())
            yield
            found.append(seen())
        found.append(seen())
        yield

    def other():
        with PATCH:
            yield
            found.append(seen())
            yield
            found.append(seen())

    alternating(one, other)
    assert found == [PATCHED, PATCHED, ORIGINAL, PATCHED, PATCHED]
    assert all(now is then for now, then in zip(attributes(), before, strict=True))


def test_patch_with_when_replaces_for_the_callers_that_it_chooses():
    """For code that contexts do not reach: autograd runs backward passes in threads of its own."""
    inside = []
    patch = Patch((Base, "name", louder), when=lambda: bool(inside))
    with patch:
        assert Base().name() == "base"
        inside.append(True)
        assert in_a_thread(Base().name) == "base!"
    assert Base().name() == "base"
