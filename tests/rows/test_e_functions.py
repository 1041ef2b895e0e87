"""Rows E: compiled functions."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from sklearn.datasets import load_diabetes

import handloom as hl
from handloom.errors import TraceError
from tests.rows.figures import below


def cube(x):
    return x**3


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int32(2)])
def test_e1_the_cube_of_2_is_8(eagerly, number, shown):
    found = hl.function(cube)(number)
    assert float(found) == 8
    shown(f"{float(found):.0f} for 2 and for 2.0")


def test_e1_the_original_is_kept():
    compiled = hl.function(cube)
    assert compiled.python_function is cube
    assert compiled.python_function(2) == 8
    assert compiled.traces == []


def test_e1_there_is_one_trace_for_each_shape_and_dtype(shown):
    compiled = hl.function(cube)
    new = {"float32[]": np.float32(2), "int32[]": np.int32(2), "float32[3]": np.ones(3, "float32")}
    for signature, x in new.items():
        np.testing.assert_array_equal(compiled(x), x**3)
        assert compiled.traces[-1].signature == f"x: {signature}"
    for x in new.values():
        np.testing.assert_array_equal(compiled(x + 1), (x + 1) ** 3)
        compiled(ops.convert_to_tensor(x))
    assert len(compiled.traces) == len(new)
    assert all(trace.compiled for trace in compiled.traces)
    shown(f"{len(compiled.traces)} traces for {len(new)} shapes and dtypes")


def squares_up_to(n):
    return n * (n + 1) * (2 * n + 1) // 6


def by_while_loop(n, seen):
    def add(i, total):
        seen.append(i)
        return i + 1, total + i * i

    return ops.while_loop(lambda i, total: i <= n, add, (ops.ones_like(n), ops.zeros_like(n)))[1]


def by_fori_loop(n, seen):
    def add(i, total):
        seen.append(i)
        return total + i * i

    return ops.fori_loop(0, n + 1, add, ops.zeros_like(n))


@pytest.mark.parametrize("loop", [by_while_loop, by_fori_loop])
def test_e2_a_loop_over_tensors_is_compiled_and_not_unrolled(loop, shown):
    seen = []
    compiled = hl.function(lambda n: loop(n, seen))
    assert [int(compiled(np.int32(n))) for n in (3, 1000, 0)] == [squares_up_to(n) for n in (3, 1000, 0)]
    [trace] = compiled.traces
    assert trace.compiled
    assert len(seen) < 10  # The body ran while it was traced, and not once an iteration.
    shown(f"squares up to 1000: {int(compiled(np.int32(1000)))}, in {len(compiled.traces)} trace")


def test_e2_a_loop_is_compiled_in_a_step_that_builds_its_layers_too():
    layer, optimizer = layers.Dense(1), keras.optimizers.SGD(0.1)

    @hl.function
    def step(x, n):
        hl.minimize(lambda: ops.mean(layer(x) ** 2), layer, optimizer)
        return by_fori_loop(n, [])

    assert [int(step(np.ones((2, 3), "float32"), np.int32(n))) for n in (3, 4)] == [squares_up_to(n) for n in (3, 4)]
    assert len(step.traces) == 1


@pytest.mark.parametrize("loop", [by_while_loop, by_fori_loop])
def test_e2_a_loop_over_tensors_op_by_op(loop):
    with hl.run_eagerly(True):
        assert int(hl.function(loop)(np.int32(100), [])) == squares_up_to(100)


def test_e2_a_branch_over_tensors_is_compiled(eagerly):
    seen = []

    def note(branch, value):
        seen.append(branch)
        return value

    @hl.function
    def absolute(x):
        return ops.cond(x < 0, lambda: note("below", -x), lambda: note("above", x))

    values = [-3.0, 3.0, 0.0, -5.0]
    assert [float(absolute(np.float32(value))) for value in values] == [3, 3, 0, 5]
    if not eagerly:
        assert set(seen) == {"below", "above"}
        assert len(absolute.traces) == 1


def by_python_for(n):
    total = 0 * n
    for i in range(n + 1):
        total = total + i * i
    return total


def by_python_while(n):
    i, total = 0 * n, 0 * n
    while i < n:
        i = i + 1
        total = total + i * i
    return total


def by_python_if(n):
    total = 0 * n
    if n > 0:
        total = n * (n + 1) * (2 * n + 1) // 6
    return total


python_control_flow = pytest.mark.parametrize("by_python", [by_python_for, by_python_while, by_python_if])


@python_control_flow
@pytest.mark.backend("tensorflow")
def test_e2_python_loops_and_branches_over_tensors_are_compiled_on_tensorflow(by_python, shown):
    compiled = hl.function(by_python)
    assert [int(compiled(np.int32(n))) for n in (3, 1000, 0)] == [squares_up_to(n) for n in (3, 1000, 0)]
    [trace] = compiled.traces
    assert trace.compiled
    shown("Python's own for, while and if are compiled")


@python_control_flow
@pytest.mark.backend("jax", "torch")
def test_e2_python_loops_and_branches_over_tensors_are_an_error_elsewhere(by_python, refused):
    with pytest.raises(TraceError) as raised:
        hl.function(by_python)(np.int32(3))
    for alternative in ("ops.fori_loop", "ops.while_loop", "ops.cond"):
        assert alternative in str(raised.value)
    assert "test_e_functions.py, line" in str(raised.value)
    refused("Python's own for, while and if over tensors")


@python_control_flow
def test_e2_python_loops_and_branches_work_op_by_op_everywhere(by_python):
    with hl.run_eagerly(True):
        assert int(hl.function(by_python)(np.int32(10))) == squares_up_to(10)


def losses_and_weights(seen):
    """Ten steps of a net with dropout and batch normalization from the same start."""
    keras.utils.set_random_seed(0)
    x, y = (array[:64].astype("float32") for array in load_diabetes(return_X_y=True))
    y = (y[:, None] - y.mean()) / y.std()
    model = keras.Sequential(
        [layers.Dense(8), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.3), layers.Dense(1)]
    )
    model.build((None, 10))
    optimizer, error = keras.optimizers.SGD(0.05, momentum=0.9), keras.metrics.MeanAbsoluteError()

    @hl.function
    def step(x, y):
        def loss_fn():
            y_pred = model(x, training=True)
            return ops.mean((y_pred - y) ** 2), y_pred

        loss, y_pred = hl.minimize(loss_fn, model, optimizer, has_aux=True)
        error.update_state(y, y_pred)
        seen.append(loss)
        return loss, error.result()

    history = [[float(value) for value in step(x, y)] for _ in range(10)]
    return history, model.get_weights(), step.traces


def test_e4_a_step_run_op_by_op_gives_the_same_numbers(shown):
    seen = []
    compiled, compiled_weights, traces = losses_and_weights([])
    with hl.run_eagerly(True):
        eager, weights, no_traces = losses_and_weights(seen)
    assert len(traces) == 1
    assert no_traces == []
    np.testing.assert_allclose(eager, compiled, rtol=1e-4)
    for one, other in zip(weights, compiled_weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert [float(loss) for loss in seen] == [loss for loss, _ in eager]  # For `print` and `pdb` to see.
    shown(f"10 losses apart by {below(np.abs(np.subtract(eager, compiled)).max())}")
