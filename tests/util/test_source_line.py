"""The line of the user's code that an error or warning is about."""

import json
from pathlib import Path

import pytest

import handloom
from handloom._util.source_line import frames_of, place_in, shown, users_frame

pytestmark = pytest.mark.once

OURS = str(Path(handloom.__file__).parent / "_run" / "loop.py")
LIBRARY = str(Path(pytest.__file__))
STANDARD = str(Path(json.__file__))


def shown_in(frames):
    return shown(place_in(frames))


def failing():
    json.loads("{")  # The culprit.


def caught():
    try:
        failing()
    except ValueError as error:
        return error
    raise AssertionError


def test_frames_of_an_error_begin_outermost_and_place_in_takes_the_users_innermost_line():
    frames, line = frames_of(caught()), failing.__code__.co_firstlineno + 1
    assert frames[0][0] == __file__
    assert frames[1] == (__file__, line)
    assert Path(frames[-1][0]).name == "decoder.py"
    assert shown_in(frames) == f'{__file__}, line {line}: json.loads("{{")  # The culprit.'


def test_place_in_skips_handloom_libraries_and_python():
    frames = [(__file__, 1), (OURS, 1), (LIBRARY, 1), (STANDARD, 1), ("<frozen importlib>", 1)]
    assert (
        shown_in(frames) == f'{__file__}, line 1: """The line of the user\'s code that an error or warning is about."""'
    )
    assert shown_in(frames[1:]) == "(line unknown)"
    assert shown_in([]) == "(line unknown)"


def test_place_in_counts_recipes_as_the_users_code():
    recipe = str(Path(handloom.__file__).parent / "recipes" / "digits.py")
    assert shown_in([(__file__, 1), (recipe, 1)]).startswith(f"{recipe}, line 1: ")


def test_shown_names_a_line_that_cannot_be_read():
    assert shown_in([("<stdin>", 7)]) == "<stdin>, line 7: "


def test_place_in_counts_a_folder_whose_name_begins_like_handlooms_as_the_users():
    beside = str(Path(handloom.__file__).parent) + "_experiments"
    assert shown_in([(f"{beside}/train.py", 1)]).startswith(beside)


def test_users_frame_skips_libraries():
    [frame] = map(lambda _: users_frame(), [0])  # noqa: C417
    assert frame.f_code.co_name == "<lambda>"
    found = json.loads("{}", object_hook=lambda _: users_frame().f_code.co_filename)
    assert found == __file__
