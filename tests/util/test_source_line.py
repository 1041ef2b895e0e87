"""The line of the user's code that an error or warning is about."""

import json
from concurrent.futures import ThreadPoolExecutor, thread
from pathlib import Path

import pytest

import handloom
from handloom._util.source_line import frames_of, place_in, shown, users_frame

pytestmark = pytest.mark.once

PACKAGE = Path(handloom.__file__).parent
OURS, RECIPE = str(PACKAGE / "_run" / "loop.py"), str(PACKAGE / "recipes" / "digits.py")
BESIDE = f"{PACKAGE}_experiments/train.py"
LIBRARY = str(Path(pytest.__file__))
STANDARD = str(Path(json.__file__))


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
    assert shown(place_in(frames)) == f'{__file__}, line {line}: json.loads("{{")  # The culprit.'


@pytest.mark.parametrize(
    ("files", "users"),
    [
        ([__file__, OURS, LIBRARY, STANDARD, "<frozen importlib>"], __file__),
        ([OURS, LIBRARY, STANDARD, "<frozen importlib>"], None),
        ([], None),
        ([__file__, RECIPE], RECIPE),
        ([BESIDE], BESIDE),
    ],
    ids=["all", "none", "empty", "recipe", "folder beside"],
)
def test_place_in_takes_the_innermost_line_of_the_user(files, users):
    assert place_in([(file, 1) for file in files]) == (users and (users, 1))


def test_shown_names_a_line_that_cannot_be_read_or_is_unknown():
    assert shown(("<stdin>", 7)) == "<stdin>, line 7: "
    assert shown(None) == "line unknown"


def test_users_frame_skips_libraries():
    [frame] = map(lambda _: users_frame(), [0])  # noqa: C417
    assert frame.f_code.co_name == "<lambda>"
    found = json.loads("{}", object_hook=lambda _: users_frame().f_code.co_filename)
    assert found == __file__


def test_users_frame_without_code_of_the_user_is_the_innermost_of_a_library():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(users_frame).result().f_code.co_filename == thread.__file__
