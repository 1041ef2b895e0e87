"""`short`: values in messages."""

import keras
import numpy as np
import pytest
from keras import ops

from handloom._util.short import short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        ("adam", "'adam'"),
        (np.zeros((2, 3)), "a tensor of shape (2, 3)"),
        (ops.zeros((2, 3)), "a tensor of shape (2, 3)"),
        (keras.Variable(0.0), "a tensor of shape ()"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16..."),
        ([np.zeros((9, 9))], "[array([[0., 0., 0., 0., 0., 0., 0., 0., 0.], [0., 0., 0...."),
    ],
)
def test_short_is_one_line_of_at_most_60_characters(value, text):
    assert short(value) == text
    assert len(text) <= 60
