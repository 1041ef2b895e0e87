"""JAX: programs that donate their state, and the internals of JAX and Keras that this needs."""

import sys

import jax
import jax.experimental.sparse
import jax.extend.core
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.backends.jax import program as programs
from handloom.errors import GradientError, TraceError, VariableError
from tests.backends.programs import run, traced
from tests.numbers import close, ones, same


def zeros():
    return np.zeros(1000, "float32")


def address(variable):
    return variable._value.unsafe_buffer_pointer()


# ------------------------------------------------------------------------- sparse


@pytest.mark.parametrize("kind", [{"n_batch": 1}, {"n_dense": 1}, {}])
def test_function_takes_sparse_tensors_of_each_layout(kind):
    dense = np.array([[0, 1.0], [2.0, 0], [0, 0]], "float32")
    step = hl.function(lambda x: ops.convert_to_tensor(x, sparse=False))
    for _ in range(2):
        same(step(jax.experimental.sparse.BCOO.fromdense(dense, **kind)), dense)
    assert len(step.traces) == 1


def test_function_has_one_version_for_sparse_tensors_with_about_as_many_values():
    step = hl.function(lambda x: ops.sum(ops.convert_to_tensor(x, sparse=False), axis=1))
    for stored in (5, 6, 8, 3, 4):
        indices = np.stack([np.arange(stored) % 2, np.arange(stored)], axis=1)
        total = step(backend.sparse_tensor(indices, np.ones(stored, "float32"), (2, 9)))
        same(total, [-(-stored // 2), stored // 2])
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


def test_function_uses_the_memory_of_a_written_variable_again():
    variable = keras.Variable(zeros())
    step = adding(variable)
    before = address(variable)
    step()
    assert address(variable) == before
    close(variable.value, 2 * ones(1000))


def test_function_copies_a_value_that_the_user_holds():
    variable = keras.Variable(zeros())
    step = adding(variable)
    held, view, before = variable.value, np.asarray(variable.value), address(variable)
    step()
    assert address(variable) != before
    assert not held.is_deleted()
    close([held, view, variable], [ones(1000), ones(1000), 2 * ones(1000)])


@pytest.mark.parametrize("written", [0, 1])
def test_function_copies_an_array_that_two_variables_share(written):
    variables = [keras.Variable(zeros()) for _ in range(2)]
    step = adding(variables[written])
    variables[0].assign(variables[1])
    assert address(variables[0]) == address(variables[1])
    shared = np.array(variables[0].value)
    step()
    close(variables[written].value, shared + 1)
    close(variables[1 - written].value, shared)


def test_function_writes_two_variables_that_share_an_array():
    one, two = (keras.Variable(zeros()) for _ in range(2))
    step = adding(one, two)
    one.assign(two)
    step()
    close([one, two], [2 * ones(1000)] * 2)


def test_function_copies_an_argument_that_a_written_variable_holds():
    variable = keras.Variable(zeros())

    @hl.function
    def step(x):
        variable.assign(variable + x)

    step(variable.value)
    variable.assign(jnp.ones(1000))
    for expected in (2, 4, 8):
        step(variable.value)
        close(variable.value, expected * ones(1000))


def test_function_leaves_the_array_of_a_variable_that_it_only_reads():
    factor, total = keras.Variable(2 * ones(1000)), keras.Variable(ones(1000))

    @hl.function
    def step():
        total.assign(total * factor)

    before = factor._value
    step()
    step()
    assert factor._value is before
    close(total.value, 4 * ones(1000))


def test_getrefcount_shows_an_array_that_only_its_variable_holds():
    """Another version of Python may count otherwise."""
    variable = keras.Variable(ones(3))
    values = [variable._value]
    assert max(map(sys.getrefcount, values)) == programs._HELD_BY_VARIABLE
    held = variable._value
    assert max(map(sys.getrefcount, values)) == programs._HELD_BY_VARIABLE + 1
    del held


# -------------------------------------------------------------------------- programs


def test_trace_compiles_a_program_for_its_shapes_only():
    calls = []
    program = traced(lambda x: [x * 2, calls.append(1)][:1], ones(3))
    count = len(calls)
    for _ in range(3):
        close(run(program, ones(3))[0], 2 * ones(3))
    assert len(calls) == count
    with pytest.raises(TypeError, match="differ from the types for which"):
        run(program, ones(4))


def test_compiled_of_jax_has_a_call_without_python_code_after_its_first_call():
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    compiled(jnp.ones(3))
    assert isinstance(compiled._call, programs._NATIVE)
    close(compiled._call(jnp.ones(3)), 2 * ones(3))
    compiled._call = None
    close(compiled(jnp.ones(3)), 2 * ones(3))


def test_to_tensor_returns_a_numpy_array_as_it_is():
    array = ones(3)
    assert backend.to_tensor(array) is array


def test_function_has_one_version_for_weak_and_strong_types():
    double = hl.function(lambda x: x * 2)
    weak = jnp.asarray(2.0)
    assert weak.weak_type
    close([double(weak), double(np.float32(2)), double(jnp.ones(()))], [4, 4, 2])
    assert len(double.traces) == 1


def test_function_may_call_python_in_a_pure_callback():
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


def test_function_refuses_a_mask_whose_size_depends_on_the_data():
    def positive(x):
        return x[x > 0]

    line = positive.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"line {line}: return x\[x > 0\](?s:.*)keras\.ops\.where"):
        hl.function(positive)(ones(3))


# --------------------------------------------------- functions given to operations

INSIDE = {
    "while_loop": lambda v: ops.while_loop(lambda i: i < 3, lambda i: (v.assign(v + 1), i + 1)[1:], (0,)),
    "scan": lambda v: ops.scan(lambda c, x: (c, v.assign(v + x)), 0.0, ops.ones(3)),
    "vectorized_map": lambda v: ops.vectorized_map(lambda x: v.assign(v + x), ops.ones(3)),
}


@pytest.mark.parametrize("operation", INSIDE)
def test_function_refuses_an_assignment_inside_an_operation(operation):
    variable = keras.Variable(1.0, name="counter")
    with pytest.raises(VariableError, match=r"(?s)'counter' is assigned inside a function.*assign it outside"):
        hl.function(lambda: INSIDE[operation](variable))()
    close(variable.value, 1)


def test_grad_refuses_an_assignment_inside_an_operation():
    variable = keras.Variable(1.0)
    with pytest.raises(VariableError, match="is assigned inside a function that was passed to an operation"):
        hl.grad(lambda x: x * INSIDE["scan"](variable)[0])(2.0)
    close(variable.value, 1)


def test_function_refuses_a_tensor_that_leaves_a_branch_unreturned():
    @hl.function
    def step(x):
        smuggled = []
        ops.cond(x > 0, lambda: smuggled.append(x * 2), lambda: smuggled.append(x * 3))
        return smuggled[0]

    with pytest.raises(TraceError, match=r"used outside of the function.*passed to an operation.*Return the tensor"):
        step(np.float32(1))


def test_function_runs_layers_with_state_in_loops():
    layer = layers.LSTM(2, dropout=0.5, seed=1)
    function = hl.function(lambda x: layer(x, training=True))
    assert np.abs(np.asarray(function(ones(1, 4, 3))) - np.asarray(function(ones(1, 4, 3)))).max() > 0


# ------------------------------------------------------------- internals of JAX's own


def test_primitives_finds_convolutions_in_branches_and_functions():
    kernel = jnp.ones((2, 1, 1))

    def convolve(x):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    def step(x):
        return jax.lax.cond(x.sum() > 0, jax.jit(convolve), lambda x: x, x)

    found = programs._primitives(jax.make_jaxpr(step)(jnp.ones((1, 3, 1))).jaxpr)
    assert "conv_general_dilated" in found
    assert "conv_general_dilated" not in programs._primitives(jax.make_jaxpr(lambda x: x @ x.T)(jnp.ones((2, 3))).jaxpr)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("transform", [hl.grad, lambda fn: hl.function(hl.grad(fn))], ids=["eager", "compiled"])
def test_grad_names_an_operation_without_a_derivative(transform):
    with pytest.raises(GradientError, match=r"JAX has no derivative of the operation schur\..*custom_gradient"):
        transform(lambda x: jnp.sum(jax.scipy.linalg.schur(x)[0]))(np.diag([1.0, 2.0, 3.0]).astype("float32"))
