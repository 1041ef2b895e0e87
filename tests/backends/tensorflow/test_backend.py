"""TensorFlow: concrete functions, AutoGraph, and the internals of both and of Keras that this needs."""

import functools
import logging
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tensorflow.python.autograph.core import config as autograph_config
from tensorflow.python.autograph.impl import api

import handloom as hl
from handloom.backends import backend
from handloom.backends.tensorflow import backend as ours
from handloom.errors import GradientError
from tests.backends.programs import run, traced
from tests.numbers import close, ones

# -------------------------------------------------------------------------- programs


def test_trace_gives_one_concrete_function():
    calls = []
    program = traced(lambda x: [x * 2, calls.append(1)][:1], ones(3))
    for _ in range(3):
        close(run(program, ones(3))[0], 2 * ones(3))
    assert len(calls) == 1


@pytest.mark.parametrize(("jit_compile", "expected"), [(True, True), (False, False), ("auto", False)])
def test_trace_uses_xla_on_request_and_by_default_only_with_an_accelerator(jit_compile, expected):
    program = traced(lambda x: [x * 2], ones(3), jit_compile=jit_compile)
    assert program._concrete.function_def.attr["_XlaMustCompile"].b is expected


def test_function_compiles_a_step_with_a_gradient_tape():
    layer = layers.Dense(1, use_bias=False, kernel_initializer="ones")
    optimizer = keras.optimizers.SGD(0.5)

    @hl.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x))
        gradients = tape.gradient(loss, layer.trainable_weights)
        optimizer.apply_gradients(zip(gradients, layer.trainable_weights, strict=True))
        return loss

    close(step(ones(1, 3)), 3)
    close(step(ones(1, 3)), 1.5)


def test_function_inside_a_tf_function_becomes_part_of_it():
    total = keras.Variable(0.0)

    @hl.function
    def add(x):
        total.assign_add(x)
        return total * 1

    outer = tf.function(lambda x: add(x) * 10)
    close(outer(tf.constant(1.0)), 10)
    close(outer(tf.constant(2.0)), 30)
    close(total, 3)


def test_function_distinguishes_ragged_and_sparse_tensors():
    name = hl.function(lambda x: type(x).__name__)
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    sparse = tf.sparse.from_dense([[0.0, 1.0]])
    assert [name(x) for x in (ragged, sparse)] == ["RaggedTensor", "SparseTensor"]
    assert [trace.signature for trace in name.traces] == [
        "x: RaggedTensor float32[2,None]",
        "x: SparseTensor float32[1,2]",
    ]


def test_is_array_of_a_variable_of_tensorflow_but_not_of_keras():
    variable = keras.Variable(1.0)
    assert isinstance(variable.value, tf.Variable)
    assert tf.is_tensor(variable)
    assert backend.is_array(variable.value)
    assert not backend.is_array(variable)
    for read in (backend.to_tensor(variable.value), backend.detach(variable.value)):
        variable.assign(1.0)
        assert not isinstance(read, tf.Variable)
        variable.assign(5.0)
        close(read, 1)


# ---------------------------------------------------------------------- control flow


def absolute(x):
    if x > 0:
        return x
    return -x


class Tools:
    def absolute(self, x):
        return absolute(x)

    @hl.function
    def step(self, x):
        return self.absolute(x)


@pytest.mark.parametrize("helper", [absolute, Tools().absolute, functools.partial(absolute), Tools().step])
def test_function_converts_functions_that_it_calls(helper):
    function = hl.function(lambda x: helper(x) * 2)
    close([function(np.float32(-3)), function(np.float32(3))], [6, 6])
    assert len(function.traces) == 1


def test_function_compiles_loops_with_break_and_continue():
    @hl.function
    def collatz(n):
        steps = n * 0
        while steps < 1000:
            if n == 1:
                break
            steps += 1
            if n % 2 == 0:
                n = n // 2
                continue
            n = 3 * n + 1
        return steps

    close([collatz(np.int32(6)), collatz(np.int32(27))], [8, 111])
    assert len(collatz.traces) == 1


def test_function_converts_a_function_that_it_differentiates():
    @hl.function
    def slope(x):
        return hl.grad(absolute)(x)

    close([slope(np.float32(3)), slope(np.float32(-3))], [1, -1])


@pytest.mark.parametrize("sign", [1, -1])
def test_minimize_in_a_function_compiles_if_in_a_loss_function_that_builds_its_layer(sign):
    dense, optimizer = layers.Dense(1, kernel_initializer="ones"), keras.optimizers.SGD(0.1)

    def loss_fn():
        value = sign * ops.sum(dense(ones(2, 3)))
        if value > 0:
            return value
        return -3 * value

    close(hl.function(lambda: hl.minimize(loss_fn, dense, optimizer))(), 6 if sign > 0 else 18)
    close(dense.kernel, (1 - 0.1 * 2 * (1 if sign > 0 else 3)) * ones(3, 1))


def test_with_control_flow_converts_nothing_outside_of_a_trace():
    assert backend.with_control_flow(absolute) is absolute
    close(hl.grad(absolute)(-3.0), -1)


def test_function_logs_no_message_of_autograph(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)
    v = keras.Variable(2.0)

    @hl.function
    def step(x):
        gradient = hl.grad(lambda x: ops.sum(x**2) * v)(x)
        return gradient, hl.jacobian(lambda y: y * 2)(x), hl.hessian(lambda y: ops.sum(y**3))(x)

    with caplog.at_level(logging.DEBUG, logger="tensorflow"):
        step(ones(2))
    assert [record.getMessage() for record in caplog.records if record.name == "tensorflow"] == []


@pytest.mark.parametrize(("module", "action"), [("_function", "DO_NOT_CONVERT"), ("recipes.digits", "CONVERT")])
def test_autograph_converts_recipes_and_nothing_else_of_handloom(module, action):
    module = types.ModuleType(f"handloom.{module}")
    actions = (rule.get_action(module) for rule in autograph_config.CONVERSION_RULES)
    decided = next(action for action in actions if action is not autograph_config.Action.NONE)
    assert decided is autograph_config.Action[action]


# ---------------------------------------------------------------------------- errors


def test_function_raises_an_error_of_handloom_as_it_is():
    @hl.function
    def step(x):
        return hl.grad(lambda x: x)(x)

    with pytest.raises(GradientError, match="taken of a scalar"):
        step(ones(2))


class OwnError(Exception):
    def __init__(self, code, what):
        super().__init__(code, what)


def test_function_raises_an_error_of_the_user_with_a_note_of_the_line():
    @hl.function
    def step(x):
        raise OwnError(1, "broken")

    with pytest.raises(OwnError) as raised:
        step(ones(2))
    [note] = raised.value.__notes__
    assert __file__ in note
    assert 'raise OwnError(1, "broken")' in note


# ------------------------------------------------------------------------- variables


def test_trace_that_fails_leaves_the_variables_that_it_created_initialized():
    layer = layers.Dense(1)

    def fn(x):
        layer(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        traced(fn, ones(1, 3))
    assert layer.kernel.numpy().shape == (3, 1)
    close(layer(ones(1, 3)), layer.kernel.numpy().sum(keepdims=True))


def test_trace_that_creates_variables_runs_twice():
    runs, made = [], []

    def fn(x):
        runs.append(1)
        if not made:
            made.append(keras.Variable("ones", shape=()))
        return [x * made[0]]

    program = traced(fn, ones(2))
    assert len(runs) == 2
    close(run(program, ones(2))[0], ones(2))


def test_variables_made_outside_of_graphs_in_a_graph_that_is_thrown_away():
    with ours._variables_made_outside_of_graphs, tf.__internal__.FuncGraph("failing").as_default():
        variable = keras.Variable("ones", shape=(2,))
    close(variable, ones(2))


# --------------------------------------------------------- internals of TensorFlow's own


def test_staging_error_has_the_lines_of_the_original_code():
    def fail(x):
        raise OwnError(1, "broken")

    with pytest.raises(api.StagingError) as raised:
        ours._convert(fail)(1)
    original = raised.value.__context__
    assert isinstance(original, OwnError)
    frame = original.ag_error_metadata.translated_stack[0]
    assert (frame.filename, frame.lineno) == (__file__, fail.__code__.co_firstlineno + 1)
