"""TensorFlow: concrete functions, AutoGraph, and what of them and of Keras Handloom relies on."""

import functools
import logging
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.autograph.core import config as autograph_config
from tensorflow.python.autograph.impl import api

import handloom as hl
from handloom.backends import backend
from handloom.backends.tensorflow import backend as ours
from handloom.errors import GradientError, TraceError


def ones(*shape):
    return np.ones(shape, "float32")


def close(actual, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=1e-6)


# -------------------------------------------------------------------------- programs


def test_a_program_is_one_concrete_function():
    calls = []

    def fn(x):
        calls.append(1)
        return [x * 2]

    program = backend.trace(fn, [tf.ones(3)], jit_compile="auto")
    for _ in range(3):
        close(program([tf.ones(3)])[0], 2 * ones(3))
    assert len(calls) == 1


@pytest.mark.parametrize(("jit_compile", "expected"), [(True, True), (False, False), ("auto", False)])
def test_xla_compiles_where_it_is_asked_for_and_by_itself_only_with_an_accelerator(jit_compile, expected):
    program = backend.trace(lambda x: [x * 2], [tf.ones(3)], jit_compile=jit_compile)
    assert program._concrete.function_def.attr["_XlaMustCompile"].b is expected


def test_a_step_in_tensorflows_own_manner_is_compiled():
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


def test_inside_a_function_of_tensorflows_it_becomes_part_of_that():
    total = keras.Variable(0.0)

    @hl.function
    def add(x):
        total.assign_add(x)
        return total * 1

    outer = tf.function(lambda x: add(x) * 10)
    close(outer(tf.constant(1.0)), 10)
    close(outer(tf.constant(2.0)), 30)
    close(total, 3)


def test_tensors_of_every_kind_are_told_apart():
    name = hl.function(lambda x: type(x).__name__)
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    sparse = tf.sparse.from_dense([[0.0, 1.0]])
    assert [name(x) for x in (ragged, sparse)] == ["RaggedTensor", "SparseTensor"]
    assert [trace.signature for trace in name.traces] == [
        "x: RaggedTensor float32[2,None]",
        "x: SparseTensor float32[1,2]",
    ]


def test_strings_are_data():
    length = hl.function(tf.strings.length)
    close(length(np.array(["ab", "c"])), [2, 1])
    close(length(tf.constant(["abc", "de"])), [3, 2])
    assert len(length.traces) == 1


def test_a_variable_of_tensorflows_is_data_and_one_of_kerass_is_not():
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
        if x > 0:
            return x
        return -x


@pytest.mark.parametrize("helper", [absolute, Tools().absolute, functools.partial(absolute)])
def test_what_a_step_calls_is_converted_too(helper):
    function = hl.function(lambda x: helper(x) * 2)
    close([function(np.float32(-3)), function(np.float32(3))], [6, 6])
    assert len(function.traces) == 1


def test_loops_over_tensors_with_break_and_continue_are_compiled():
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


def test_a_function_that_is_differentiated_is_converted_in_a_step():
    @hl.function
    def slope(x):
        return hl.grad(absolute)(x)

    close([slope(np.float32(3)), slope(np.float32(-3))], [1, -1])


def test_a_method_is_converted():
    class Step:
        @hl.function
        def run(self, x):
            if x > 0:
                return x
            return -x

    close(Step().run(np.float32(-2)), 2)


def test_outside_of_a_trace_nothing_is_converted():
    assert backend.with_control_flow(absolute) is absolute
    close(hl.grad(absolute)(-3.0), -1)


def test_autograph_has_nothing_to_say():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("tensorflow")
    logger.addHandler(handler)
    try:
        v = keras.Variable(2.0)

        @hl.function
        def step(x):
            gradient = hl.grad(lambda x: ops.sum(x**2) * v)(x)
            return gradient, hl.jacobian(lambda y: y * 2)(x), hl.hessian(lambda y: ops.sum(y**3))(x)

        step(ones(2))
    finally:
        logger.removeHandler(handler)
    assert said == []


@pytest.mark.parametrize(("module", "action"), [("_function", "DO_NOT_CONVERT"), ("recipes.digits", "CONVERT")])
def test_handloom_runs_as_it_is_written_and_recipes_are_converted(module, action):
    module = types.ModuleType(f"handloom.{module}")
    actions = (rule.get_action(module) for rule in autograph_config.CONVERSION_RULES)
    decided = next(action for action in actions if action is not autograph_config.Action.NONE)
    assert decided is autograph_config.Action[action]


# ---------------------------------------------------------------------------- errors


def asks_for_a_number(x):
    return np.asarray(x) * 2


def test_the_line_that_is_named_is_the_users():
    @hl.function
    def step(x):
        y = x + 1
        return asks_for_a_number(y)

    line = asks_for_a_number.__code__.co_firstlineno + 1
    with pytest.raises(TraceError) as raised:
        step(ones(2))
    assert f"{__file__}, line {line}: return np.asarray(x) * 2" in str(raised.value)


def test_an_error_of_ours_is_no_error_of_autographs():
    @hl.function
    def step(x):
        return hl.grad(lambda x: x)(x)

    with pytest.raises(GradientError, match="taken of a scalar"):
        step(ones(2))


class OwnError(Exception):
    def __init__(self, code, what):
        super().__init__(code, what)


def test_an_error_of_the_users_is_raised_with_a_note_of_where():
    @hl.function
    def step(x):
        raise OwnError(1, "broken")

    with pytest.raises(OwnError) as raised:
        step(ones(2))
    [note] = raised.value.__notes__
    assert __file__ in note
    assert 'raise OwnError(1, "broken")' in note


# ------------------------------------------------------------------------- variables


def test_variables_made_in_a_trace_that_fails_have_their_values():
    layer = layers.Dense(1)

    def fn(x):
        layer(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        backend.trace(fn, [tf.ones((1, 3))], jit_compile="auto")
    assert layer.kernel.numpy().shape == (3, 1)
    close(layer(ones(1, 3)), layer.kernel.numpy().sum(keepdims=True))


def test_a_trace_that_makes_variables_is_traced_again():
    runs, made = [], []

    def fn(x):
        runs.append(1)
        if not made:
            made.append(keras.Variable("ones", shape=()))
        return [x * made[0]]

    program = backend.trace(fn, [tf.ones(2)], jit_compile="auto")
    assert len(runs) == 2
    close(program([tf.ones(2)])[0], ones(2))


def test_keras_makes_its_variable_where_it_is_watched():
    original = keras.Variable._initialize
    with ours._variables_made_outside_of_graphs:
        assert keras.Variable._initialize is not original
        with tf.__internal__.FuncGraph("failing").as_default():
            variable = keras.Variable("ones", shape=(2,))
    assert keras.Variable._initialize is original
    close(variable, ones(2))


# --------------------------------------------------------- internals of TensorFlow's own


def test_a_function_can_be_converted_by_hand():
    converted = api.convert(recursive=True, conversion_ctx=ag_ctx.ControlStatusCtx(status=ag_ctx.Status.ENABLED))

    @tf.function(autograph=False)
    def graph(x):
        return converted(absolute)(x)

    close(graph(tf.constant(-2.0)), 2)


def test_an_error_in_converted_code_knows_the_lines_it_came_through():
    def fail(x):
        raise OwnError(1, "broken")

    with pytest.raises(api.StagingError) as raised:
        ours._convert(fail)(1)
    original = raised.value.__context__
    assert isinstance(original, OwnError)
    frame = original.ag_error_metadata.translated_stack[0]
    assert (frame.filename, frame.lineno) == (__file__, fail.__code__.co_firstlineno + 1)


def test_a_graph_can_be_opened_to_try_a_function_in():
    with tf.__internal__.FuncGraph("shapes").as_default():
        assert not tf.executing_eagerly()
    assert tf.executing_eagerly()
