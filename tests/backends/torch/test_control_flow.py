"""`keras.ops.cond`, `while_loop` and `fori_loop` on PyTorch: compiled, not unrolled, equal to eager execution."""

import keras
import numpy as np
import optree
import pytest
import torch
from keras import ops
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.while_loop import while_loop_op

import handloom as hl
from handloom.backends import backend
from handloom.errors import FallbackWarning
from tests.numbers import numpy


@pytest.fixture
def v():
    return keras.Variable(2.0, name="v")


def both_ways(fn, v, *arguments):
    """The result, and the variable afterwards, which are the same compiled and eagerly; and the trace."""
    function, found = hl.function(fn), []
    for eagerly in (False, True):
        v.assign(2.0)
        with hl.run_eagerly(eagerly):
            result = function(*arguments)
        found.append(optree.tree_map(lambda leaf: numpy(leaf).tolist(), [result, v]))
    assert found[0] == found[1]
    return (*found[0], function.traces[0])


def operations(fn, *tensors):
    """The operations of a compiled function, without those in branches and loop bodies."""
    program = backend.trace(fn, [torch.as_tensor(tensor) for tensor in tensors], jit_compile="auto")
    return [node.target for node in program._graph.graph.nodes if node.op == "call_function"]


X, N = np.float32(3), np.int32(4)

COMPILED = {
    "cond closes over data and variables": (lambda v, x: ops.cond(x > 0, lambda: x * v, lambda: -x), X, 6, 2),
    "cond the other way": (lambda v, x: ops.cond(x < 0, lambda: x * v, lambda: -x), X, -3, 2),
    "cond of numbers": (lambda v, x: ops.cond(x > 0, lambda: 1.5, lambda: 2.5), X, 1.5, 2),
    "cond of structures": (
        lambda v, x: ops.cond(x > 0, lambda: {"a": x, "b": [v * 1]}, lambda: {"a": -x, "b": [x]}),
        X,
        {"a": 3, "b": [2]},
        2,
    ),
    "cond of nothing": (lambda v, x: ops.cond(x > 0, lambda: None, lambda: None), X, None, 2),
    "cond on a variable": (lambda v, x: ops.cond(v > 5, lambda: x, lambda: -x), X, -3, 2),
    "one branch assigns": (
        lambda v, x: (ops.cond(x < 0, lambda: v.assign(v * 10), lambda: v.value), v + x),
        X,
        (2, 5),
        2,
    ),
    "while": (
        lambda v, n: ops.while_loop(lambda i, s: i < n, lambda i, s: (i + 1, s + i), (0, 0)),
        N,
        (4, 6),
        2,
    ),
    "while with one value": (lambda v, n: ops.while_loop(lambda i: i < n, lambda i: i + 1, 0), N, 4, 2),
    "while at most": (
        lambda v, n: ops.while_loop(lambda i: i < n, lambda i: (i + 1,), (0,), maximum_iterations=2),
        N,
        (2,),
        2,
    ),
    "while not at all": (lambda v, n: ops.while_loop(lambda i: i < 0, lambda i: (i + n,), (0,)), N, (0,), 2),
    "while closes over what it starts from": (
        lambda v, x: ops.while_loop(lambda s: s < v * 100, lambda s: (s * x * v,), (x,)),
        X,
        (648,),
        2,
    ),
    "cond in while": (
        lambda v, n: ops.while_loop(
            lambda i, s: i < n,
            lambda i, s: (i + 1, ops.cond(i % 2 == 0, lambda: s + v, lambda: s * 2.0)),
            (0, 1.0),
        ),
        N,
        (4, 16),
        2,
    ),
    "fori": (lambda v, n: ops.fori_loop(0, n, lambda i, s: s + i, 0), N, 6, 2),
    "fori with a lower bound": (lambda v, n: ops.fori_loop(n, n * 2, lambda i, s: s + i, 0), N, 22, 2),
    "fori of a known length": (lambda v, x: ops.fori_loop(0, 3, lambda i, s: s * x, x), X, 81, 2),
    "fori of structures": (
        lambda v, n: ops.fori_loop(0, n, lambda i, s: {"a": s["a"] + i, "b": (s["b"][0] * v,)}, {"a": 0, "b": (1.0,)}),
        N,
        {"a": 6, "b": (16,)},
        2,
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_control_flow_is_compiled_and_equal_to_eager_execution(name, v):
    fn, argument, expected, after = COMPILED[name]
    result, value, trace = both_ways(lambda x: fn(v, x), v, argument)
    assert (result, value) == (expected, after)
    assert trace.compiled, trace.reason


def test_cond_is_one_operation_and_fori_loop_is_not_unrolled():
    assert operations(lambda x: [ops.cond(x > 0, lambda: ops.sin(x), lambda: ops.cos(x))], 1.0).count(cond_op) == 1
    short, long = (
        operations(lambda x, length=length: [ops.fori_loop(0, length, lambda i, s: s * 1.5 + i, x)], 1.0)
        for length in (3, 3000)
    )
    assert short == long
    assert long.count(while_loop_op) == 1


# ---------------------------------------------------------------------- randomness


def test_cond_draws_new_numbers_in_a_branch_as_in_eager_execution():
    seed = keras.random.SeedGenerator(5)

    @hl.function
    def draw(x):
        return ops.cond(x > 0, lambda: keras.random.normal((3,), seed=seed), lambda: ops.zeros(3))

    def run():
        seed.state.assign([5, 0])
        return [numpy(draw(np.float32(x))).tolist() for x in (1, -1, 1)]

    compiled = run()
    with hl.run_eagerly(True):
        assert compiled == run()
    assert compiled[0] != compiled[2]
    assert draw.traces[0].compiled


# ---------------------------------------------------------------------- falling back

FALLS_BACK = {
    "a loop assigns a variable": (
        lambda v, n: ops.while_loop(lambda i: i < n, lambda i: (v.assign(v + 1), i + 1)[1:], (0,)),
        N,
        r"variables \(v\) are assigned in the body of a loop",
        (4,),
        6,
    ),
    "a loop of unknown length is differentiated": (
        lambda v, x: hl.grad(lambda x: ops.while_loop(lambda s: s < 100, lambda s: (s * x,), (x,))[0])(x),
        X,
        "the gradient of a loop needs a number of iterations that is known",
        405,
        2,
    ),
    "a loop changes the shape of its values": (
        lambda v, n: ops.while_loop(lambda s: ops.sum(s) < n, lambda s: (ops.tile(s, 2),), (ops.ones(1),)),
        N,
        r"loop variables change from torch.float32\(1,\) to torch.float32\(2,\)",
        ([1, 1, 1, 1],),
        2,
    ),
    "branches differ in structure": (
        lambda v, x: ops.cond(x > 0, lambda: (x, x), lambda: x),
        X,
        "branches of keras.ops.cond return different structures",
        (3, 3),
        2,
    ),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_control_flow_that_cannot_be_compiled_falls_back_and_says_why(name, v):
    fn, argument, reason, expected, after = FALLS_BACK[name]
    with pytest.warns(FallbackWarning, match=reason):
        result, value, trace = both_ways(lambda x: fn(v, x), v, argument)
    assert (result, value) == (expected, after)
    assert not trace.compiled
