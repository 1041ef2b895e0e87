"""Which line of the user's made a trace fail."""

import json
from pathlib import Path

import pytest

import handloom
from handloom.backends.source_line import (
    frames_of,
    naming_what_has_no_derivative,
    needs_a_value,
    tensorflow_called,
    users_line,
)
from handloom.errors import GradientError, TraceError

pytestmark = pytest.mark.once

OURS = str(Path(handloom.__file__).parent / "_run" / "loop.py")
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


def test_the_frames_of_an_error_begin_outermost():
    frames = list(frames_of(caught()))
    assert frames[0][0] == __file__
    assert frames[1] == (__file__, failing.__code__.co_firstlineno + 1)
    assert Path(frames[-1][0]).name == "decoder.py"


def test_the_users_innermost_line_is_named_with_its_code():
    line = failing.__code__.co_firstlineno + 1
    assert users_line(frames_of(caught())) == f'{__file__}, line {line}: json.loads("{{")  # The culprit.'


def test_lines_of_ours_of_libraries_and_of_python_are_passed_over():
    frames = [(__file__, 1), (OURS, 1), (LIBRARY, 1), (STANDARD, 1), ("<frozen importlib>", 1)]
    assert users_line(frames) == f'{__file__}, line 1: """Which line of the user\'s made a trace fail."""'
    assert users_line(frames[1:]) == "(line unknown)"
    assert users_line([]) == "(line unknown)"


def test_a_recipe_is_somebodys_own():
    recipe = str(Path(handloom.__file__).parent / "recipes" / "digits.py")
    assert users_line([(__file__, 1), (recipe, 1)]).startswith(f"{recipe}, line 1: ")


def test_a_line_that_cannot_be_read_is_named_all_the_same():
    assert users_line([("<stdin>", 7)]) == "<stdin>, line 7: "


def test_the_error_says_where_why_and_what_to_do():
    error = needs_a_value([(__file__, 3)])
    assert isinstance(error, TraceError)
    message = str(error)
    assert f"{__file__}, line 3: import json" in message
    for cure in ("keras.ops.cond", "keras.ops.where", "keras.ops.while_loop", "keras.ops.fori_loop", "run_eagerly"):
        assert cure in message


def test_a_folder_whose_name_begins_as_ours_is_the_users():
    beside = str(Path(handloom.__file__).parent) + "_experiments"
    assert users_line([(f"{beside}/train.py", 1)]).startswith(beside)


def test_an_operation_of_tensorflow_in_a_step_of_another_backend_is_named_as_that():
    inside = str(Path(pytest.__file__).parents[1] / "tensorflow" / "python" / "ops.py")
    line = failing.__code__.co_firstlineno + 1
    told = str(tensorflow_called([(__file__, line), (inside, 3)], "jax"))
    assert "A compiled step on jax calls TensorFlow" in told
    assert f'{__file__}, line {line}: json.loads("{{")' in told
    assert tensorflow_called([(__file__, line), (LIBRARY, 3)], "jax") is None


@pytest.mark.parametrize("error", [KeyError("w"), RuntimeError("out of memory"), GradientError("no scalar")])
def test_other_errors_of_a_gradient_pass_as_they_are(error):
    with pytest.raises(type(error)) as raised, naming_what_has_no_derivative("JAX"):
        raise error
    assert raised.value is error
