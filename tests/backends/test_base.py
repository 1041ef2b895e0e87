"""The contract of `handloom/backends/base.py`, method by method, on the backend of this process."""

import contextlib
import signal
import threading

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import layers, ops

import handloom as hl
from handloom.backends import Backend, backend
from handloom.errors import TraceError, VariableError

DTYPES = ["float16", "float32", "int8", "int16", "int32", "uint8", "bool"]
X = np.arange(6, dtype="float32").reshape(2, 3)


def close(actual, expected, rtol=1e-6):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=rtol, atol=1e-7)


def ones(*shape):
    return np.ones(shape, "float32")


def compiled(fn, *tensors, jit_compile="auto"):
    return backend.trace(fn, list(map(backend.to_tensor, tensors)), jit_compile=jit_compile)


def run(program, *tensors):
    return program(list(map(backend.to_tensor, tensors)))


def test_the_backend_is_the_one_that_keras_runs_on():
    assert isinstance(backend, Backend)
    assert backend.name == keras.backend.backend()


@pytest.mark.once
def test_every_method_is_documented():
    public = {name: member for name, member in vars(Backend).items() if not name.startswith("_") and callable(member)}
    assert set(public) >= {"is_array", "to_tensor", "signature", "to_numpy", "detach", "trace", "value_and_grad"}
    assert all(member.__doc__ for member in public.values())


# ------------------------------------------------------------------------ tensors


def test_tensors_and_numpy_are_data():
    variable = keras.Variable(1.0)
    for leaf in (ops.ones(2), np.ones(2), np.float32(1), np.int64(1), np.bool_(True), variable.value):
        assert backend.is_array(leaf)


def test_everything_else_is_static():
    for leaf in (1, 2.5, True, "a", None, [1], (ops.ones(2),), keras.Variable(1.0), layers.Dense(1), object()):
        assert not backend.is_array(leaf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_kept(dtype):
    tensor = backend.to_tensor(np.ones(3, dtype))
    assert keras.backend.standardize_dtype(tensor.dtype) == dtype
    assert backend.signature(tensor) == ((3,), dtype)


def test_bfloat16_of_numpy_is_kept():
    tensor = backend.to_tensor(np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16))
    assert backend.signature(tensor) == ((3,), "bfloat16")
    close(ops.cast(tensor, "float32"), np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16).astype("float32"))


INDICES, VALUES, DENSE = np.array([[0, 2], [1, 0], [1, 1]]), np.array([5, 7, -2], "float32"), [[0, 0, 5], [7, -2, 0]]


@pytest.mark.backend("jax", "tensorflow")
def test_a_sparse_tensor_is_data_and_goes_through_a_program():
    tensor = backend.sparse_tensor(INDICES, VALUES, (2, 3))
    assert backend.is_array(tensor)
    (shape, dtype), weights = backend.signature(tensor), np.arange(6, dtype="float32").reshape(3, 2)
    assert shape == (2, 3)
    assert dtype.endswith("float32")
    program = compiled(
        lambda x, weights: [ops.matmul(x, weights), ops.sum(ops.convert_to_tensor(x, sparse=False))], tensor, weights
    )
    product, total = run(program, tensor, weights)
    close(product, np.array(DENSE) @ weights)
    close(total, 10)


@pytest.mark.backend("jax", "tensorflow")
@settings(max_examples=25, deadline=None)
@given(arrays.arrays("float32", (4, 5), elements=st.sampled_from([0.0, 0.0, 1.0, -2.5]), fill=st.nothing()))
def test_a_sparse_tensor_holds_what_it_was_made_of(dense):
    indices = np.argwhere(dense)
    tensor = backend.sparse_tensor(indices, dense[tuple(indices.T)], dense.shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(tensor), dense)


@pytest.mark.backend("torch")
def test_there_are_no_sparse_tensors_for_keras_on_torch():
    assert backend.sparse_tensor(INDICES, VALUES, (2, 3)) is None


def test_text_is_for_tensorflow():
    assert backend.holds_text is (backend.name == "tensorflow")


@pytest.mark.parametrize("floatx", ["float32", "float16"])
def test_floats_of_64_bits_become_the_floats_of_keras(floatx):
    keras.config.set_floatx(floatx)
    try:
        tensors = [backend.to_tensor(value) for value in (np.ones(2), np.float64(1), np.ones(2, ">f8"))]
    finally:
        keras.config.set_floatx("float32")
    assert [keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors] == [floatx] * 3


@pytest.mark.backend("tensorflow", "torch")
def test_whole_numbers_of_64_bits_are_kept():
    assert backend.signature(backend.to_tensor(np.ones(2, "int64"))) == ((2,), "int64")


@pytest.mark.backend("jax")
def test_whole_numbers_of_64_bits_are_32_bits_in_jax():
    assert backend.signature(backend.to_tensor(np.ones(2, "int64"))) == ((2,), "int32")


def test_a_tensor_is_given_back_as_it_is():
    tensor = ops.ones((2, 3))
    assert backend.to_tensor(tensor) is tensor


@settings(max_examples=30, deadline=None)
@given(
    arrays.arrays("float32", arrays.array_shapes(min_side=0), elements=st.floats(-99, 99, width=16)),
    st.sampled_from(["float32", "float64", "int32", "bool"]),
)
def test_values_come_back_as_they_went_in(array, dtype):
    array = array.astype(dtype)
    back = backend.to_numpy(ops.convert_to_tensor(backend.to_tensor(array)))
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    "array",
    [X[:, ::-1], X.T, X[:, ::2], np.broadcast_to(X, (4, 2, 3)), X.astype(">f4"), np.float32(3), np.array(3.0), X[:0]],
    ids=["reversed", "transposed", "strided", "read-only", "foreign byte order", "scalar", "no dimension", "empty"],
)
def test_an_array_may_lie_in_memory_as_it_likes(array):
    tensor = backend.to_tensor(array)
    assert backend.signature(tensor) == (array.shape, "float32")
    close(tensor, array)


def test_a_signature_is_plain_and_the_same_for_arrays_and_tensors():
    shape, dtype = backend.signature(backend.to_tensor(X))
    assert (shape, dtype) == ((2, 3), "float32")
    assert [type(part) for part in (shape, dtype, *shape)] == [tuple, str, int, int]
    assert backend.signature(ops.convert_to_tensor(X)) == (shape, dtype)
    assert backend.signature(backend.to_tensor(np.float32(1))) == ((), "float32")


def test_values_of_half_precision_can_be_read():
    for dtype in ("float16", "bfloat16"):
        close(backend.to_numpy(ops.convert_to_tensor([0.5, 2.0], dtype=dtype)).astype("float32"), [0.5, 2])


def test_a_detached_tensor_is_changed_by_nothing():
    variable, array = keras.Variable(ones(3)), ones(3)
    tensors = [backend.detach(variable.value), backend.detach(ops.convert_to_tensor(backend.to_tensor(array)))]
    variable.assign(5 * ones(3))
    array[:] = 5
    for tensor in tensors:
        close(tensor, ones(3))


# ----------------------------------------------------------------------- compiling


def test_a_program_reads_and_writes_the_variables_of_the_moment():
    total, factor = keras.Variable(ones(3)), keras.Variable(2.0)

    def fn(x):
        total.assign_add(factor * x)
        return [total * 1, ops.sum(x)]

    program = compiled(fn, ones(3))
    close(total, ones(3))
    first, count = run(program, ones(3))
    close(first, 3 * ones(3))
    close(count, 3)
    factor.assign(10.0)
    total.assign(np.zeros(3))
    run(program, 2 * ones(3))
    close(total, 20 * ones(3))


def repeated(fn, *examples, steps):
    """A program that runs `fn` so often in one call."""
    tensors = [backend.to_tensor(example) for example in examples]
    program = backend.trace(fn, tensors, jit_compile="auto")
    run = program.fused(steps) or (lambda batches: [program(batch) for batch in batches][-1])  # Torch gains nothing.
    return lambda *batches: run([[backend.to_tensor(array) for array in batch] for batch in batches])


def test_a_repeated_program_takes_its_batches_in_their_order_and_returns_the_last_results():
    value, factor = keras.Variable(1.0), keras.Variable(2.0)

    def fn(x, y):
        value.assign(factor * value + ops.sum(x))
        return [value * 1, y + 1]

    run = repeated(fn, ones(2), np.int32(0), steps=4)
    close(value, 1)  # Tracing changes nothing.
    for start in (1.0, 5.0):
        value.assign(start)
        last, other = run(*((k * ones(2), np.int32(k)) for k in range(4)))
        expected = start
        for k in range(4):
            expected = 2 * expected + 2 * k
        close(value, expected)
        close(last, expected)
        close(other, 4)
    factor.assign(0.0)  # Read anew in each call.
    run(*((ones(2), np.int32(0)) for _ in range(4)))
    close(value, 2)


def test_a_repeated_program_may_have_neither_tensors_nor_results():
    value = keras.Variable(1.0)

    def fn():
        value.assign(value * 3)
        return []

    assert list(repeated(fn, steps=3)([], [], [])) == []
    close(value, 27)


@pytest.mark.parametrize(
    "net",
    [lambda: layers.Dense(2), lambda: layers.Conv1D(2, 2, padding="same")],
    ids=["in a loop", "unrolled"],  # As JAX does it.
)
def test_a_repeated_step_does_what_single_ones_do(net):
    """With batch-norm, dropout, momentum and a metric: all that a step keeps."""
    batches = [np.random.default_rng(k).normal(size=(3, 4, 2)).astype("float32") for k in range(5)]

    def trained(run_all):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([net(), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)])
        optimizer, metric = keras.optimizers.SGD(0.1, momentum=0.9), keras.metrics.Mean()

        def fn(x):
            loss = hl.minimize(lambda: ops.mean((model(x, training=True) - 1) ** 2), model, optimizer)
            metric.update_state(loss)
            return [loss]

        model.build((None, 4, 2))
        optimizer.build(model.trainable_variables)
        run_all(fn)
        return [np.array(v.numpy()) for v in (*model.variables, *optimizer.variables, *metric.variables)]

    def one_by_one(fn):
        program = compiled(fn, batches[0])
        for batch in batches:
            run(program, batch)

    together = trained(lambda fn: repeated(fn, batches[0], steps=5)(*([batch] for batch in batches)))
    for one, other in zip(together, trained(one_by_one), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_tracing_changes_no_variable():
    layer, seed = layers.BatchNormalization(), keras.random.SeedGenerator(1)
    layer.build((None, 3))
    state = [*layer.variables, seed.state]
    before = [variable.numpy() for variable in state]
    compiled(lambda x: [layer(x + keras.random.normal((2, 3), seed=seed), training=True)], X)
    for variable, value in zip(state, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_there_may_be_nothing_to_take_or_to_give():
    variable = keras.Variable(1.0)

    def fn():
        variable.assign(variable * 2)
        return []

    program = compiled(fn)
    assert list(program([])) == []
    close(variable, 2)
    [constant] = compiled(lambda: [ops.ones(2)])([])
    close(constant, ones(2))


def test_a_result_may_be_given_twice_and_be_an_argument():
    one, two, three = run(compiled(lambda x: [x, x, x + 0], X), X)
    for result in (one, two, three):
        close(result, X)


def test_variables_made_in_the_first_run_have_their_first_value_in_the_next():
    made = []

    def fn(x):
        if not made:
            made.append(keras.Variable("ones", shape=(3,)))
        made[0].assign_add(x)
        return [made[0] * 1]

    program = compiled(fn, ones(3))
    close(made[0], ones(3))
    [result] = run(program, ones(3))
    close(result, 2 * ones(3))


def test_a_variable_that_is_new_each_time_is_refused():
    def fn(x):
        return [x * keras.Variable("ones", shape=())]

    with pytest.raises((VariableError, ValueError), match=r"second time|singleton|stateless"):
        run(compiled(fn, ones(3)), ones(3))


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_a_program_gives_what_the_function_gives(jit_compile):
    program = compiled(lambda x: [ops.exp(x), ops.cumsum(x, axis=1)], X, jit_compile=jit_compile)
    if program is not None:
        exponential, sums = run(program, X)
        close(exponential, np.exp(X), rtol=1e-5)
        close(sums, np.cumsum(X, axis=1))


@pytest.mark.backend("jax")
def test_without_a_compiler_there_may_be_no_program():
    assert compiled(lambda x: [x], X, jit_compile=False) is None


@pytest.mark.backend("tensorflow", "torch")
def test_without_a_kernel_compiler_there_is_a_plain_program():
    assert compiled(lambda x: [x], X, jit_compile=False) is not None


def test_the_value_of_a_tensor_cannot_be_had_while_tracing():
    def fn(x):
        return [x if x.shape[0] > 5 or bool(ops.sum(x) > 0) else -x]

    # On TensorFlow it is AutoGraph, in `with_control_flow`, that would make this work.
    with pytest.raises(TraceError, match=r"line \d+: return \[x if"):
        compiled(fn, X)


def test_outside_of_a_trace_control_flow_is_pythons():
    x = backend.to_tensor(np.float32(2.0))
    assert float(backend.with_control_flow(lambda x: x + 1 if x > 0 else x)(x)) == 3


# What TensorFlow's own Python does to a call that is interrupted is not ours; the loop lets none be.
@pytest.mark.backend("jax", "torch")
def test_an_interrupt_leaves_each_variable_with_its_old_or_its_new_value():
    one, two = keras.Variable(np.zeros(64, "float32")), keras.Variable(np.zeros(64, "float32"))

    def fn(x):
        one.assign_add(x)
        two.assign_add(x)
        return [ops.sum(one)]

    program, tensor, armed = compiled(fn, ones(64)), backend.to_tensor(ones(64)), []
    program([tensor])  # A first call may build what the later ones use; within the loop none is interrupted.

    def interrupt(*_):
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def until_interrupted(seconds):
        armed.append(True)
        # Again and again: what is raised in a hook of the garbage collector's is lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1e-3)
        while armed:
            program([tensor])

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for attempt in range(100):
            one.assign(np.zeros(64))
            two.assign(np.zeros(64))
            with contextlib.suppress(KeyboardInterrupt):
                until_interrupted(1e-4 + attempt * 1e-5)
            first, second = one.numpy(), two.numpy()
            assert len(set(first)) == len(set(second)) == 1
            assert abs(first[0] - second[0]) <= 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    one.assign(np.zeros(64))
    program([tensor])
    close(one, ones(64))


# ------------------------------------------------------------------- making variables


def test_layers_are_built_on_shapes_alone():
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


def test_building_changes_no_value():
    norm, seed, count = layers.BatchNormalization(), keras.random.SeedGenerator(3), keras.Variable(0.0)
    norm.build((None, 3))
    dense = layers.Dense(2)

    def fn():
        count.assign_add(1.0)
        return dense(norm(keras.random.normal((2, 3), seed=seed), training=True))

    before = [variable.numpy() for variable in (*norm.variables, seed.state, count)]
    backend.create_variables(fn)
    for variable, value in zip((*norm.variables, seed.state, count), before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert np.isfinite(dense.kernel.numpy()).all()


def test_layers_are_built_inside_a_trace_too():
    layer = layers.Dense(1, kernel_initializer="ones")

    def fn(x):
        if not layer.built:
            backend.create_variables(lambda: layer(x))
        return [layer(x)]

    close(run(compiled(fn, X), X)[0], X.sum(axis=1, keepdims=True))


# ------------------------------------------------------------------- differentiating


def test_value_gradients_and_the_rest():
    w = keras.Variable(2.0)
    x, y = backend.to_tensor(np.float32(3)), backend.to_tensor(ones(2))

    def fn(x, y):
        return w**2 * x + ops.sum(y * y), [y + 1, w * 1]

    value, (rest, weight), of_tensors, of_variables = backend.value_and_grad(fn, [x, y], [w])
    close(value, 14)
    close(rest, 2 * ones(2))
    close(weight, 2)
    close(of_tensors[0], 4)
    close(of_tensors[1], 2 * ones(2))
    close(of_variables[0], 12)


def test_what_does_not_reach_the_value_has_none():
    a, b, c = (keras.Variable(float(n)) for n in range(3))
    x, y = (backend.to_tensor(np.float32(n)) for n in (1, 2))

    def fn(x, y):
        return a * x + ops.stop_gradient(b * y), []

    _, _, of_tensors, of_variables = backend.value_and_grad(fn, [x, y], [a, b, c])
    assert [gradient is None for gradient in (*of_tensors, *of_variables)] == [False, True, False, True, True]


def test_a_value_that_reaches_nothing_has_none_for_all():
    _, _, of_tensors, of_variables = backend.value_and_grad(
        lambda x: (ops.ones(()), []), [backend.to_tensor(np.float32(1))], [keras.Variable(1.0)]
    )
    assert (list(of_tensors), list(of_variables)) == ([None], [None])


def test_only_the_stand_in_for_a_tensor_is_differentiated():
    x = ops.convert_to_tensor(np.float32(3))
    _, _, [gradient], _ = backend.value_and_grad(lambda inner: (inner * x, []), [x], [])
    close(gradient, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_has_the_shape_and_dtype_of_its_source(dtype):
    w = keras.Variable(np.ones((2, 3)), dtype=dtype)
    x = ops.ones((3,), dtype=dtype)
    _, _, [of_x], [of_w] = backend.value_and_grad(lambda x: (ops.sum(ops.cast(w * x, "float32")), []), [x], [w])
    assert backend.signature(of_x) == ((3,), dtype)
    assert backend.signature(of_w) == ((2, 3), dtype)


def test_what_is_done_to_variables_is_done_once():
    count, w = keras.Variable(0.0), keras.Variable(3.0)

    def fn():
        count.assign_add(w)
        return w * count, []

    value, _, _, _ = backend.value_and_grad(fn, [], [w])
    close([count, w, value], [3, 3, 9])


def test_gradients_of_gradients_stay_differentiable():
    w = keras.Variable(2.0)

    def inner():
        return w**3, []

    def outer():
        return backend.value_and_grad(inner, [], [w])[3][0] + w, []

    value, _, _, [gradient] = backend.value_and_grad(outer, [], [w])
    close([value, gradient], [12 + 2, 12 + 1])


def test_the_derivatives_of_several_outputs():
    w = keras.Variable(np.array([1, 2], "float32"))
    count = keras.Variable(0.0)
    x = backend.to_tensor(np.array([1, 2, 3], "float32"))

    def fn(x):
        count.assign_add(1.0)
        return [x * x, ops.sum(w), ops.ones(2)], [x + 1]

    outputs, aux, rows = backend.jacobian(fn, [x], [w])
    (of_square, of_square_by_w), (none, of_sum), (nothing, nothing_by_w) = rows
    close(ops.concatenate([outputs[0], outputs[1][None], outputs[2], *aux]), [1, 4, 9, 3, 1, 1, 2, 3, 4])
    close(of_square[0], np.diag([2, 4, 6]))
    close(of_sum[0], ones(2))
    assert (of_square_by_w, none, nothing, nothing_by_w) == ([None], [None], [None], [None])
    close(count, 1)


def test_a_derivative_has_the_shapes_of_both():
    x = backend.to_tensor(X)
    _, _, [([derivative], [])] = backend.jacobian(lambda x: ([ops.transpose(x)], []), [x], [])
    assert backend.signature(derivative) == ((3, 2, 2, 3), "float32")
    close(ops.sum(derivative), 6)


@settings(max_examples=5, deadline=None)
@given(arrays.arrays("float32", (2, 3), elements=st.floats(-2, 2, width=32)))
def test_the_derivative_of_a_linear_map_is_the_map(matrix):
    x = backend.to_tensor(ones(3))
    _, _, [([derivative], [])] = backend.jacobian(lambda x: ([ops.matmul(matrix, x)], []), [x], [])
    close(derivative, matrix)


# ------------------------------------------------------------------------------- marks


def unused_marks(fn, *arrays):
    tensors = [backend.to_tensor(np.float32(array)) for array in arrays]
    program = backend.trace(fn, tensors, jit_compile="auto")
    return program.dependencies.unused, program(tensors)


def test_a_mark_that_leads_to_a_result_or_a_variable_is_used():
    kept = keras.Variable(1.0)

    def fn(x, y, z):
        kept.assign(kept + backend.marked(x, "assigned") * 2)
        backend.marked(y, "dropped") * 3
        return [ops.exp(backend.marked(z, "returned"))]

    names, [result] = unused_marks(fn, 1, 2, 3)
    assert names == ["dropped"]
    close([kept, result], [3, np.exp(3)], 1e-6)


def test_a_mark_is_followed_through_gradients():
    w = keras.Variable(2.0)

    def fn(x, y):
        def loss():
            return w**2 * backend.marked(x, "of the loss (1)"), [backend.marked(y, "of what is not looked at")]

        _, _, _, [gradient] = backend.value_and_grad(loss, [], [w])
        w.assign(w - gradient)
        return []

    names, _ = unused_marks(fn, 0.25, 1)
    assert names == ["of what is not looked at"]
    close(w, 1)


def test_one_of_several_marks_of_a_name_suffices():
    names, _ = unused_marks(lambda x, y: [backend.marked(y, "both") + 0 * len([backend.marked(x, "both")])], 1, 2)
    assert names == []


def test_outside_of_a_trace_a_mark_is_nothing():
    x = backend.to_tensor(np.float32(1))
    assert backend.marked(x, "x") is x


# ----------------------------------------------------------------------------- nesting


def test_it_is_known_what_runs_inside_what():
    seen = []

    def look(*tensors):
        seen.append(backend.nested)
        return tensors[0] * 1 if tensors else ops.ones(())

    x = backend.to_tensor(np.float32(1))
    assert not backend.nested
    compiled(lambda x: [look(x)], np.float32(1))
    backend.value_and_grad(lambda x: (look(x), []), [x], [])
    backend.jacobian(lambda x: ([look(x)], []), [x], [])
    backend.create_variables(look)
    assert len(seen) >= 4
    assert all(seen)
    assert not backend.nested


def test_after_an_error_nothing_is_nested():
    def fail(*_):
        raise RuntimeError("mine")

    x = backend.to_tensor(np.float32(1))
    for attempt in (
        lambda: compiled(fail, np.float32(1)),
        lambda: backend.value_and_grad(fail, [x], []),
        lambda: backend.jacobian(fail, [x], []),
        lambda: backend.create_variables(fail),
    ):
        with pytest.raises(Exception, match="mine"):
            attempt()
        assert not backend.nested


def test_another_thread_is_not_nested():
    seen = []

    def look(x):
        thread = threading.Thread(target=lambda: seen.append(backend.nested))
        thread.start()
        thread.join()
        return x * 1, []

    backend.value_and_grad(look, [backend.to_tensor(np.float32(1))], [])
    assert seen == [False]
