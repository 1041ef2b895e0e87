"""JAX: programs that donate their state, and what of JAX and Keras they rely on."""

import sys

import jax
import jax.experimental.sparse
import jax.extend.core
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.random import seed_generator

import handloom as hl
from handloom.backends import backend
from handloom.backends.jax import backend as ours
from handloom.backends.jax import program as programs
from handloom.backends.jax.gradients import Reached
from handloom.errors import GradientError, TraceError, VariableError


def ones(*shape):
    return np.ones(shape, "float32")


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-6)


def address(variable):
    return variable._value.unsafe_buffer_pointer()


# ------------------------------------------------------------------------- sparse


@pytest.mark.parametrize("kind", [{"n_batch": 1}, {"n_dense": 1}, {}])
def test_sparse_tensors_of_each_layout_go_through_a_program(kind):
    dense = np.array([[0, 1.0], [2.0, 0], [0, 0]], "float32")
    step = hl.function(lambda x: ops.convert_to_tensor(x, sparse=False))
    for _ in range(2):
        np.testing.assert_array_equal(step(jax.experimental.sparse.BCOO.fromdense(dense, **kind)), dense)
    assert len(step.traces) == 1


def test_sparse_tensors_with_about_as_many_values_share_a_program():
    step = hl.function(lambda x: ops.sum(ops.convert_to_tensor(x, sparse=False), axis=1))
    for stored in (5, 6, 8, 3, 4):
        indices = np.stack([np.arange(stored) % 2, np.arange(stored)], axis=1)
        total = step(backend.sparse_tensor(indices, np.ones(stored, "float32"), (2, 9)))
        np.testing.assert_array_equal(total, [-(-stored // 2), stored // 2])
    assert [trace.signature for trace in step.traces] == [
        "x: sparse, 8 stored, float32[2,9]",
        "x: sparse, 4 stored, float32[2,9]",
    ]


# ------------------------------------------------------------------------- donation


def adding(*variables):
    """A function that adds one to each variable, called once: later calls are all alike."""

    @hl.function
    def step():
        for variable in variables:
            variable.assign_add(ops.ones(variable.shape))

    step()
    return step


def test_the_memory_of_a_written_variable_is_used_again():
    variable = keras.Variable(np.zeros(1000, "float32"))
    step = adding(variable)
    before = address(variable)
    step()
    assert address(variable) == before
    close(variable.value, 2 * ones(1000))


def test_a_value_that_somebody_holds_is_copied_and_stays():
    variable = keras.Variable(np.zeros(1000, "float32"))
    step = adding(variable)
    held = variable.value
    before = address(variable)
    step()
    assert address(variable) != before
    assert not held.is_deleted()
    close(held, ones(1000))
    close(variable.value, 2 * ones(1000))


def test_a_numpy_view_of_a_value_stays():
    variable = keras.Variable(np.zeros(1000, "float32"))
    step = adding(variable)
    view = np.asarray(variable.value)
    step()
    step()
    np.testing.assert_array_equal(view, ones(1000))


@pytest.mark.parametrize("written", [0, 1])
def test_an_array_that_two_variables_share_is_copied(written):
    variables = [keras.Variable(np.zeros(1000, "float32")) for _ in range(2)]
    step = adding(variables[written])
    variables[0].assign(variables[1])
    assert address(variables[0]) == address(variables[1])
    shared = np.array(variables[0].value)
    step()
    close(variables[written].value, shared + 1)
    close(variables[1 - written].value, shared)


def test_two_written_variables_may_share_an_array():
    one, two = (keras.Variable(np.zeros(1000, "float32")) for _ in range(2))
    step = adding(one, two)
    one.assign(two)
    step()
    close(one.value, 2 * ones(1000))
    close(two.value, 2 * ones(1000))


def test_an_argument_that_a_written_variable_holds_is_copied():
    variable = keras.Variable(np.zeros(1000, "float32"))

    @hl.function
    def step(x):
        variable.assign(variable + x)

    step(variable.value)
    variable.assign(jnp.ones(1000))
    for expected in (2, 4, 8):
        step(variable.value)
        close(variable.value, expected * ones(1000))


def test_a_variable_that_is_only_read_keeps_its_array():
    factor, total = keras.Variable(2 * ones(1000)), keras.Variable(ones(1000))

    @hl.function
    def step():
        total.assign(total * factor)

    before = factor._value
    step()
    step()
    assert factor._value is before
    close(total.value, 4 * ones(1000))


def test_a_variable_holds_its_array_as_counted_on():
    """`sys.getrefcount` tells an array that only its variable holds; another Python may count otherwise."""
    variable = keras.Variable(ones(3))
    values = [variable._value]
    assert max(map(sys.getrefcount, values)) == programs._HELD_BY_VARIABLE
    held = variable._value
    assert max(map(sys.getrefcount, values)) == programs._HELD_BY_VARIABLE + 1
    del held


# -------------------------------------------------------------------------- programs


def test_a_program_is_compiled_ahead_and_takes_nothing_else():
    calls = []

    def fn(x):
        calls.append(1)
        return [x * 2]

    program = backend.trace(fn, [jnp.ones(3)], jit_compile="auto")
    traced = len(calls)
    for _ in range(3):
        close(program([jnp.ones(3)])[0], 2 * ones(3))
    assert len(calls) == traced
    with pytest.raises(TypeError, match="differ from the types for which"):
        program([jnp.ones(4)])


def test_after_the_first_call_no_python_of_jaxs_runs():
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    compiled(jnp.ones(3))
    assert isinstance(compiled._call, programs._NATIVE)
    close(compiled._call(jnp.ones(3)), 2 * ones(3))
    compiled._call = None
    close(compiled(jnp.ones(3)), 2 * ones(3))


def test_arrays_of_numpy_are_taken_as_they_are():
    array = ones(3)
    assert backend.to_tensor(array) is array


def test_a_weak_type_makes_no_version_of_its_own():
    double = hl.function(lambda x: x * 2)
    weak = jnp.asarray(2.0)
    assert weak.weak_type
    close([double(weak), double(np.float32(2)), double(jnp.ones(()))], [4, 4, 2])
    assert len(double.traces) == 1


def test_python_may_be_called_from_a_step_on_purpose():
    seen, total = [], keras.Variable(0.0)

    def note(x):
        seen.append(float(x))
        return np.float32(x) * 10

    @hl.function
    def step(x):
        total.assign_add(jax.pure_callback(note, jax.ShapeDtypeStruct((), "float32"), x))
        return total * 1

    assert [float(step(np.float32(n))) for n in (1, 2, 3)] == [10, 30, 60]
    assert seen[-3:] == [1, 2, 3]


def test_a_mask_whose_size_depends_on_the_data_is_an_error():
    def positive(x):
        return x[x > 0]

    line = positive.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"line {line}: return x\[x > 0\](?s:.*)keras\.ops\.where"):
        hl.function(positive)(ones(3))


# ------------------------------------------------------------------- random numbers


def draw():
    return keras.random.normal((3,))


def test_keras_refuses_unseeded_numbers_in_a_trace_which_is_why_its_check_is_replaced():
    with pytest.raises(ValueError, match=r"\[JAX RNG\]"):
        jax.jit(draw)()
    with ours._unseeded_random_ops:
        jax.eval_shape(draw)


def test_the_check_is_back_after_a_trace_even_after_an_error():
    check = seed_generator.jax_utils
    hl.function(draw)()
    assert seed_generator.jax_utils is check

    def broken():
        draw()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        hl.function(broken)()
    assert seed_generator.jax_utils is check
    assert check.is_in_jax_tracing_scope() is False


# --------------------------------------------------- functions given to operations

INSIDE = {
    "while_loop": lambda v: ops.while_loop(lambda i: i < 3, lambda i: (v.assign(v + 1), i + 1)[1:], (0,)),
    "scan": lambda v: ops.scan(lambda c, x: (c, v.assign(v + x)), 0.0, ops.ones(3)),
    "vectorized_map": lambda v: ops.vectorized_map(lambda x: v.assign(v + x), ops.ones(3)),
}


@pytest.mark.parametrize("operation", INSIDE)
def test_a_variable_cannot_be_assigned_in_a_trace_of_its_own(operation):
    variable = keras.Variable(1.0, name="counter")
    with pytest.raises(VariableError, match=r"(?s)'counter' is assigned inside a function.*assign it outside"):
        hl.function(lambda: INSIDE[operation](variable))()
    close(variable.value, 1)


def test_nor_in_a_differentiated_function():
    variable = keras.Variable(1.0)
    with pytest.raises(VariableError, match="is assigned inside a function that was passed to an operation"):
        hl.grad(lambda x: x * INSIDE["scan"](variable)[0])(2.0)
    close(variable.value, 1)


def test_what_comes_out_of_the_operation_may_be_assigned():
    variable = keras.Variable(1.0)

    @hl.function
    def step(x):
        variable.assign(ops.cond(x > 0, lambda: variable + x, lambda: variable.value))

    step(np.float32(2))
    step(np.float32(-2))
    close(variable.value, 3)


def test_a_tensor_smuggled_out_of_a_branch_is_an_error():
    @hl.function
    def step(x):
        smuggled = []
        ops.cond(x > 0, lambda: smuggled.append(x * 2), lambda: smuggled.append(x * 3))
        return smuggled[0]

    with pytest.raises(TraceError, match=r"used outside of the function.*passed to an operation.*Return the tensor"):
        step(np.float32(1))


def test_layers_with_state_may_be_used_in_loops():
    layer = layers.LSTM(2, dropout=0.5, seed=1)
    function = hl.function(lambda x: layer(x, training=True))
    assert np.abs(np.asarray(function(ones(1, 4, 3))) - np.asarray(function(ones(1, 4, 3)))).max() > 0


# ------------------------------------------------------------- internals of JAX's own


def test_a_trace_can_be_told_from_another():
    states = []

    def look(x):
        states.append(jax.extend.core.get_opaque_trace_state())
        return x

    def outer(x):
        look(x)
        jax.lax.cond(x > 0, look, look, x)
        return look(x)

    jax.jit(outer)(1.0)
    assert states[0] == states[-1]
    assert states[0] != states[1]


def test_a_traced_function_can_be_run_again():
    closed = jax.make_jaxpr(lambda x: (x * 2, x + 1))(1.0)
    close(jax.extend.core.jaxpr_as_fun(closed)(3.0), [6, 4])


def test_a_backward_rule_is_called_only_for_what_is_reached():
    """How a gradient of zero is told from none."""
    reached = Reached()

    def fn(*flat):
        one, two, three = reached.watch(flat)
        return one * 0 + jax.lax.stop_gradient(two) + jnp.round(three)

    value, pullback = jax.vjp(fn, 1.0, 2.0, 3.0)
    gradients = reached.only(pullback(jnp.ones_like(value)))
    close(gradients[0], 0)
    assert gradients[1] is None


def test_convolutions_are_found_wherever_they_are():
    kernel = jnp.ones((2, 1, 1))

    def convolve(x):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    def step(x):
        return jax.lax.cond(x.sum() > 0, jax.jit(convolve), lambda x: x, x)

    found = programs._primitives(jax.make_jaxpr(step)(jnp.ones((1, 3, 1))).jaxpr)
    assert "conv_general_dilated" in found
    assert "conv_general_dilated" not in programs._primitives(jax.make_jaxpr(lambda x: x @ x.T)(jnp.ones((2, 3))).jaxpr)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("transform", [hl.grad, lambda fn: hl.function(hl.grad(fn))], ids=["op by op", "compiled"])
def test_an_operation_without_a_derivative_is_named(transform):
    with pytest.raises(GradientError, match=r"JAX has no derivative of the operation schur\..*custom_gradient"):
        transform(lambda x: jnp.sum(jax.scipy.linalg.schur(x)[0]))(np.diag([1.0, 2.0, 3.0]).astype("float32"))
