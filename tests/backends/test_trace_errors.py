"""Errors of a trace, which name the line of the user's code that failed."""

from pathlib import Path

import pytest

from handloom.backends.trace_errors import naming_what_has_no_derivative, tensorflow_called
from handloom.errors import GradientError

pytestmark = pytest.mark.once

LIBRARY = str(Path(pytest.__file__))


def test_tensorflow_called_names_the_backend_and_the_line():
    inside = str(Path(pytest.__file__).parents[1] / "tensorflow" / "python" / "ops.py")
    told = str(tensorflow_called([(__file__, 3), (inside, 3)], "jax"))
    assert "A compiled step on jax calls TensorFlow" in told
    assert f"{__file__}, line 3: from pathlib import Path" in told
    assert tensorflow_called([(__file__, 3), (LIBRARY, 3)], "jax") is None


@pytest.mark.parametrize("error", [KeyError("w"), RuntimeError("out of memory"), GradientError("HL999: No scalar.")])
def test_naming_what_has_no_derivative_lets_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, naming_what_has_no_derivative("JAX"):
        raise error
    assert raised.value is error
