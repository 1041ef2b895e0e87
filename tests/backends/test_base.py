"""The contract of `handloom/backends/base.py`, method by method, on the backend of this process."""

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import layers, ops

from handloom.backends import Backend, backend
from handloom.errors import TraceError
from tests.backends.programs import run, tensors, traced
from tests.numbers import close, each_same, numpy, ones, same
from tests.threads import in_a_thread

X = np.arange(6, dtype="float32").reshape(2, 3)


def test_backend_is_the_one_that_keras_runs_on():
    assert isinstance(backend, Backend)
    assert backend.name == keras.backend.backend()


@pytest.mark.once
def test_backend_documents_every_method():
    public = {name: member for name, member in vars(Backend).items() if not name.startswith("_") and callable(member)}
    assert set(public) >= {"is_array", "to_tensor", "signature", "to_numpy", "detach", "trace", "value_and_grad"}
    assert all(member.__doc__ for member in public.values())


# ------------------------------------------------------------------------ tensors


def test_is_array_of_tensors_and_numpy_arrays_only():
    variable = keras.Variable(1.0)
    for leaf in (ops.ones(2), np.ones(2), np.float32(1), np.int64(1), np.bool_(True), variable.value):
        assert backend.is_array(leaf)
    for leaf in (1, 2.5, True, "a", None, [1], (ops.ones(2),), variable, layers.Dense(1), object()):
        assert not backend.is_array(leaf)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "int8", "int16", "int32", "uint8", "bool", "int64"]
)
def test_to_tensor_keeps_a_dtype(dtype):
    array = np.array([0, 1, 5], ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensor = backend.to_tensor(array)
    assert backend.signature(tensor) == ((3,), "int32" if (dtype, backend.name) == ("int64", "jax") else dtype)
    close(ops.cast(tensor, "float32"), array.astype("float32"))


INDICES, VALUES, DENSE = np.array([[0, 2], [1, 0], [1, 1]]), np.array([5, 7, -2], "float32"), [[0, 0, 5], [7, -2, 0]]


@pytest.mark.backend("jax", "tensorflow")
def test_sparse_tensor_goes_through_a_program():
    tensor = backend.sparse_tensor(INDICES, VALUES, (2, 3))
    assert backend.is_array(tensor)
    (shape, dtype), weights = backend.signature(tensor), np.arange(6, dtype="float32").reshape(3, 2)
    assert shape == (2, 3)
    assert dtype.endswith("float32")

    def fn(x, weights):
        return [ops.matmul(x, weights), ops.sum(ops.convert_to_tensor(x, sparse=False))]

    product, total = run(traced(fn, tensor, weights), tensor, weights)
    close(product, np.array(DENSE) @ weights)
    close(total, 10)


@pytest.mark.backend("jax", "tensorflow")
@settings(max_examples=25, deadline=None)
@given(arrays.arrays("float32", (4, 5), elements=st.sampled_from([0.0, 0.0, 1.0, -2.5]), fill=st.nothing()))
def test_sparse_tensor_has_the_given_values(dense):
    indices = np.argwhere(dense)
    tensor = backend.sparse_tensor(indices, dense[tuple(indices.T)], dense.shape)
    same(tensor, dense)


@pytest.mark.backend("torch")
def test_sparse_tensor_is_none_on_torch():
    assert backend.sparse_tensor(INDICES, VALUES, (2, 3)) is None


def test_holds_text_on_tensorflow_only():
    assert backend.holds_text is (backend.name == "tensorflow")


@pytest.mark.parametrize("floatx", ["float32", "float16"])
def test_to_tensor_converts_64_bit_floats_to_floatx(floatx):
    keras.config.set_floatx(floatx)
    try:
        tensors = [backend.to_tensor(value) for value in (np.ones(2), np.float64(1), np.ones(2, ">f8"))]
    finally:
        keras.config.set_floatx("float32")
    assert [keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors] == [floatx] * 3


def test_to_tensor_returns_a_tensor_as_it_is():
    tensor = ops.ones((2, 3))
    assert backend.to_tensor(tensor) is tensor


@settings(max_examples=30, deadline=None)
@given(
    arrays.arrays("float32", arrays.array_shapes(min_side=0), elements=st.floats(-99, 99, width=16)),
    st.sampled_from(["float32", "float64", "int32", "bool"]),
)
def test_to_numpy_returns_the_values_given_to_to_tensor(array, dtype):
    array = array.astype(dtype)
    back = backend.to_numpy(ops.convert_to_tensor(backend.to_tensor(array)))
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, array)


def test_signature_has_plain_types_and_is_the_same_for_arrays_and_tensors():
    shape, dtype = backend.signature(backend.to_tensor(X))
    assert (shape, dtype) == backend.signature(ops.convert_to_tensor(X)) == ((2, 3), "float32")
    assert [type(part) for part in (shape, dtype, *shape)] == [tuple, str, int, int]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_to_numpy_reads_half_precision(dtype):
    close(backend.to_numpy(ops.convert_to_tensor([0.5, 2.0], dtype=dtype)).astype("float32"), [0.5, 2])


def test_detach_gives_a_tensor_that_no_variable_or_array_changes():
    variable, array = keras.Variable(ones(3)), ones(3)
    tensors = [backend.detach(variable.value), backend.detach(ops.convert_to_tensor(backend.to_tensor(array)))]
    variable.assign(5 * ones(3))
    array[:] = 5
    for tensor in tensors:
        close(tensor, ones(3))


# ----------------------------------------------------------------------- compiling


def test_trace_without_a_kernel_compiler_gives_a_plain_program_except_on_jax():
    program = traced(lambda x: [x], X, jit_compile=False)
    assert (program is None) == (backend.name == "jax")


def test_trace_refuses_python_control_flow_over_a_tensor():
    def fn(x):
        return [x if x.shape[0] > 5 or bool(ops.sum(x) > 0) else -x]

    # On TensorFlow, AutoGraph in `with_control_flow` makes this work.
    with pytest.raises(TraceError, match=r"line \d+: return \[x if"):
        traced(fn, X)


def test_with_control_flow_leaves_python_control_flow_alone_outside_of_a_trace():
    assert float(backend.with_control_flow(lambda x: x + 1 if x > 0 else x)(*tensors(np.float32(2)))) == 3


# ------------------------------------------------------------------- making variables


def test_create_variables_builds_layers_in_a_trace():
    net = keras.Sequential([layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)])
    ran = []

    def fn():
        ran.append(backend.nested)
        return net(X, training=True)

    backend.create_variables(fn)
    assert [tuple(v.shape) for v in net.layers[0].variables] == [(3, 4), (4,)]
    assert net.built
    assert ran
    assert all(ran)


def test_create_variables_changes_no_value():
    norm, seed, count = layers.BatchNormalization(), keras.random.SeedGenerator(3), keras.Variable(0.0)
    norm.build((None, 3))
    dense = layers.Dense(2)

    def fn():
        count.assign_add(1.0)
        return dense(norm(keras.random.normal((2, 3), seed=seed), training=True))

    state = [*norm.variables, seed.state, count]
    before = list(map(numpy, state))
    backend.create_variables(fn)
    each_same(state, before)
    assert np.isfinite(dense.kernel.numpy()).all()


def test_create_variables_inside_a_trace():
    layer = layers.Dense(1, kernel_initializer="ones")

    def fn(x):
        if not layer.built:
            backend.create_variables(lambda: layer(x))
        return [layer(x)]

    close(run(traced(fn, X), X)[0], X.sum(axis=1, keepdims=True))


# ------------------------------------------------------------------- differentiating


def test_value_and_grad_returns_value_tensors_and_both_groups_of_gradients():
    w, unused = keras.Variable(2.0), keras.Variable(1.0)

    def fn(x, y, z):
        return w**2 * x + ops.sum(y * y), [y + 1, w * 1]

    arguments = tensors(np.float32(3), ones(2), ones(2))
    value, (rest, weight), of_tensors, of_variables = backend.value_and_grad(fn, arguments, [w, unused])
    close([value, weight, of_tensors[0], of_variables[0]], [14, 2, 4, 12])
    close([rest, of_tensors[1]], [2 * ones(2)] * 2)
    assert (of_tensors[2:], of_variables[1:]) == ([None], [None])


def test_jacobian_returns_outputs_tensors_and_derivatives_of_each_output():
    w, count = keras.Variable(np.array([1, 2], "float32")), keras.Variable(0.0)

    def fn(x):
        count.assign_add(1.0)
        return [x * x, ops.sum(w), ops.ones(2)], [x + 1]

    outputs, aux, rows = backend.jacobian(fn, tensors(np.array([1, 2, 3], "float32")), [w])
    ((of_square,), of_square_by_w), (none, (of_sum,)), nothing = rows
    close(ops.concatenate([outputs[0], outputs[1][None], outputs[2], *aux]), [1, 4, 9, 3, 1, 1, 2, 3, 4])
    close(of_square, np.diag([2, 4, 6]))
    close(of_sum, ones(2))
    assert (of_square_by_w, none, nothing) == ([None], [None], ([None], [None]))
    close(count, 1)


# ------------------------------------------------------------------------------- marks


def unused_marks(fn, *arrays):
    program = traced(fn, *map(np.float32, arrays))
    return program.dependencies.unused, run(program, *map(np.float32, arrays))


def test_marked_is_used_where_it_leads_to_a_result_or_a_variable():
    kept = keras.Variable(1.0)

    def fn(x, y, z):
        kept.assign(kept + backend.marked(x, "assigned") * 2)
        backend.marked(y, "dropped") * 3
        return [ops.exp(backend.marked(z, "returned"))]

    names, [result] = unused_marks(fn, 1, 2, 3)
    assert names == ["dropped"]
    close([kept, result], [3, np.exp(3)])


def test_marked_is_followed_through_gradients():
    w = keras.Variable(2.0)

    def fn(x, y):
        def loss():
            return w**2 * backend.marked(x, "of the loss (1)"), [backend.marked(y, "of an unused result")]

        _, _, _, [gradient] = backend.value_and_grad(loss, [], [w])
        w.assign(w - gradient)
        return []

    names, _ = unused_marks(fn, 0.25, 1)
    assert names == ["of an unused result"]
    close(w, 1)


def test_marked_is_used_if_one_tensor_of_the_name_is():
    names, _ = unused_marks(lambda x, y: [backend.marked(y, "both") + 0 * len([backend.marked(x, "both")])], 1, 2)
    assert names == []


def test_marked_returns_the_tensor_itself_outside_of_a_trace():
    [x] = tensors(np.float32(1))
    assert backend.marked(x, "x") is x


# ----------------------------------------------------------------------------- nesting


def entered(fn):
    """Calls that run a function in a trace, or differentiate it."""
    x = tensors(np.float32(1))
    return (
        lambda: backend.trace(lambda x: [fn(x)], x, jit_compile="auto"),
        lambda: backend.value_and_grad(lambda x: (fn(x), []), x, []),
        lambda: backend.jacobian(lambda x: ([fn(x)], []), x, []),
        lambda: backend.create_variables(lambda: fn(ops.ones(()))),
    )


def test_nested_in_a_trace_and_in_a_differentiated_function_in_this_thread_only():
    seen = []

    def look(x):
        seen.append((backend.nested, in_a_thread(lambda: backend.nested)))
        return x * 1

    for enter in entered(look):
        assert not backend.nested
        enter()
    assert len(seen) >= 4
    assert set(seen) == {(True, False)}


def test_nested_is_false_after_an_error():
    def fail(_):
        raise RuntimeError("mine")

    for enter in entered(fail):
        with pytest.raises(Exception, match="mine"):
            enter()
        assert not backend.nested
