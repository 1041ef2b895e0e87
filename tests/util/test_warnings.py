"""A warning shows the line of the user's that it is about."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom._util.warnings import warn
from handloom.errors import FallbackWarning, HandloomWarning


def line_of(told):
    [warning] = told
    with open(warning.filename, encoding="utf-8") as file:
        return file.readlines()[warning.lineno - 1].strip()


def test_it_is_a_warning_of_handloom():
    with pytest.warns(HandloomWarning, match="words") as told:
        warn("words")
    assert line_of(told) == 'warn("words")'
    with pytest.warns(FallbackWarning):
        warn("words", FallbackWarning)


def test_what_a_step_does_not_use_is_told_at_the_call_of_fit():
    with pytest.warns(HandloomWarning) as told:
        hl.fit(lambda x, sample_weight: {}, (np.ones(3), np.ones(3)), verbose=0)
    assert line_of(told).startswith("hl.fit(")


def test_a_missing_loss_scale_is_told_in_the_step_that_minimizes():
    layer = keras.layers.Dense(1, dtype="mixed_float16")

    def step(x):
        return hl.minimize(lambda: ops.mean(layer(x)), layer, optimizer)

    optimizer = keras.optimizers.SGD()
    with pytest.warns(HandloomWarning, match="float16") as told, hl.run_eagerly(True):
        hl.function(step)(np.ones((2, 2), "float32"))
    assert line_of(told).startswith("return hl.minimize(")
