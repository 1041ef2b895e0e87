"""`keras.random` on PyTorch in a trace: seeds are read when a step runs."""

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras.src.backend.torch import core
from keras.src.backend.torch import random as keras_random
from torch.fx.experimental.proxy_tensor import make_fx

import handloom as hl
from handloom.backends.torch.random import traceable_random_ops
from handloom.errors import FallbackWarning
from tests.numbers import numpy, ones, same

DRAWS = {
    "normal": lambda seed: keras.random.normal((2, 3), mean=5.0, stddev=0.1, seed=seed),
    "normal in half precision": lambda seed: keras.random.normal((5,), dtype="float16", seed=seed),
    "truncated normal": lambda seed: keras.random.truncated_normal((5,), mean=1.0, stddev=2.0, seed=seed),
    "uniform": lambda seed: keras.random.uniform((2, 3), minval=-3.0, maxval=7.0, seed=seed),
    "whole numbers": lambda seed: keras.random.randint((5,), 10, 20, seed=seed),
    "whole numbers of 64 bits": lambda seed: keras.random.randint((5,), -5, 5, dtype="int64", seed=seed),
    "dropout": lambda seed: keras.random.dropout(ops.ones((20,)), 0.3, seed=seed),
    "dropout with a shape": lambda seed: keras.random.dropout(ops.ones((4, 5)), 0.5, noise_shape=(4, 1), seed=seed),
    "categories": lambda seed: keras.random.categorical(ops.log(ops.arange(1.0, 9.0))[None], 6, seed=seed),
    "shuffle": lambda seed: keras.random.shuffle(ops.arange(20), seed=seed),
    "no numbers": lambda seed: keras.random.normal((0,), seed=seed),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_random_draw_in_a_trace_gives_the_numbers_of_keras(draw):
    generator = keras.random.SeedGenerator(7)
    function = hl.function(lambda: draw(generator))
    with hl.run_eagerly(True):
        expected = [function() for _ in range(3)]
    generator.state.assign([7, 0])
    for value in expected:
        drawn = function()
        assert drawn.dtype == value.dtype
        same(drawn, value)
    assert function.traces[0].compiled


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_random_draw_in_a_trace_is_an_operation_on_the_seed(draw):
    """Fails if Keras calls another sampling function of torch, which is not replaced."""

    def fn(state):
        with traceable_random_ops:
            return draw(SeedOf(state))

    state = torch.tensor([7, 0])
    graph = make_fx(fn, tracing_mode="fake")(state).graph
    operations = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum(name.startswith("handloom.") for name in operations) == 1
    tagged = [node for node in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    assert tagged == []


class SeedOf(keras.random.SeedGenerator):
    """Gives one tensor as its seed."""

    def __init__(self, tensor):
        self.tensor = tensor
        self._initial_seed = 1  # Without one, dropout draws from torch's own generator.

    def next(self, ordered=True):
        return self.tensor


def test_traceable_random_ops_draw_shapes_alone_as_keras():
    with traceable_random_ops, core.device_scope("meta"):
        assert keras_random.get_device() == "meta"
        drawn = keras.random.normal((2, 3), seed=keras.random.SeedGenerator(1))
    assert drawn.device.type == "meta"


UNTRACEABLE = {"gamma": (2.0,), "beta": (2.0, 3.0), "binomial": (10.0, 0.5)}


@pytest.mark.parametrize(("name", "parameters"), UNTRACEABLE.items(), ids=UNTRACEABLE)
def test_random_draw_that_cannot_be_traced_falls_back_to_eager_execution(name, parameters):
    generator, draw = keras.random.SeedGenerator(3), getattr(keras.random, name)
    function = hl.function(lambda: draw((3,), *parameters, seed=generator))
    with hl.run_eagerly(True):
        expected = numpy([function() for _ in range(3)])
    generator.state.assign([3, 0])
    with pytest.warns(FallbackWarning, match="falls back to eager execution"):
        first = function()
    same([first, function(), function()], expected)


def test_grad_through_dropout_is_that_of_eager_execution():
    generator = keras.random.SeedGenerator(3)

    def loss(x):
        return ops.sum(keras.random.dropout(x, 0.5, seed=generator) ** 2)

    x = ones(16)
    with hl.run_eagerly(True):
        expected = numpy(hl.function(hl.grad(loss))(x))
    generator.state.assign([3, 0])
    function = hl.function(hl.grad(loss))
    same(function(x), expected)
    assert set(np.unique(expected)) == {0, 8}
    assert function.traces[0].compiled
