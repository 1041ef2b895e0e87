"""`keras.random` on torch, traced: seeds are read when a step runs."""

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras.src.backend.torch import core
from keras.src.backend.torch import random as keras_random
from keras.src.random.seed_generator import draw_seed
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import handloom as hl
from handloom.backends.torch.random import _OPERATIONS, _generator, _Seed, traceable_random_ops
from handloom.errors import FallbackWarning

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
def test_a_traced_draw_gives_the_numbers_of_keras(draw):
    generator = keras.random.SeedGenerator(7)
    function = hl.function(lambda: draw(generator))
    with hl.run_eagerly(True):
        expected = [function() for _ in range(3)]
    generator.state.assign([7, 0])
    for value in expected:
        drawn = function()
        assert drawn.dtype == value.dtype
        np.testing.assert_array_equal(drawn, value)
    assert function.traces[0].compiled


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_a_traced_draw_is_an_operation_on_the_seed(draw):
    """Notices a sampling function of torch's that Keras comes to call and that is not replaced."""

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


def test_each_replaced_function_of_torchs_exists():
    for sampler in _OPERATIONS:
        assert getattr(torch, sampler.__name__) is sampler


def test_keras_makes_its_generator_of_the_seed_as_counted_on():
    seed = torch.tensor([123, 4])
    original = keras_random.torch_seed_generator(SeedOf(seed))
    assert original.initial_seed() == _generator(seed).initial_seed()


def test_a_drawn_seed_is_a_tensor_of_two_numbers():
    drawn = draw_seed(keras.random.SeedGenerator(5))
    assert ops.convert_to_numpy(drawn).tolist() == [5, 0]


def test_keras_sees_torch_as_it_is_before_and_after():
    before = keras_random.torch_seed_generator, keras_random.torch
    with traceable_random_ops:
        assert keras_random.torch_seed_generator is not before[0]
        assert keras_random.torch is not torch
        assert keras_random.torch.float32 is torch.float32
        with traceable_random_ops:
            pass
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(keras_random.torch_seed_generator(SeedOf(torch.tensor([1, 2]))), _Seed)
    assert (keras_random.torch_seed_generator, keras_random.torch) == before
    with pytest.raises(RuntimeError), traceable_random_ops:
        raise RuntimeError
    assert (keras_random.torch_seed_generator, keras_random.torch) == before


def test_shapes_alone_are_drawn_as_ever():
    with traceable_random_ops, core.device_scope("meta"):
        assert keras_random.get_device() == "meta"
        drawn = keras.random.normal((2, 3), seed=keras.random.SeedGenerator(1))
    assert drawn.device.type == "meta"


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: keras.random.gamma((3,), 2.0, seed=seed),
        lambda seed: keras.random.beta((3,), 2.0, 3.0, seed=seed),
        lambda seed: keras.random.binomial((3,), 10.0, 0.5, seed=seed),
    ],
    ids=["gamma", "beta", "binomial"],
)
def test_a_draw_that_cannot_be_traced_runs_op_by_op_and_stays_random(draw):
    generator = keras.random.SeedGenerator(3)
    function = hl.function(lambda: draw(generator))
    with hl.run_eagerly(True):
        expected = [ops.convert_to_numpy(function()) for _ in range(3)]
    generator.state.assign([3, 0])
    with pytest.warns(FallbackWarning, match="falls back to eager execution"):
        first = function()
    np.testing.assert_array_equal([first, function(), function()], expected)


def test_gradients_pass_by_what_is_drawn():
    generator = keras.random.SeedGenerator(3)

    def loss(x):
        return ops.sum(keras.random.dropout(x, 0.5, seed=generator) ** 2)

    x = np.ones(16, "float32")
    with hl.run_eagerly(True):
        expected = ops.convert_to_numpy(hl.function(hl.grad(loss))(x))
    generator.state.assign([3, 0])
    function = hl.function(hl.grad(loss))
    np.testing.assert_array_equal(function(x), expected)
    assert set(np.unique(expected)) == {0, 8}
    assert function.traces[0].compiled
