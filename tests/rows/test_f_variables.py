"""Row F2: variables assigned in a step, wholly, in part and by index, as in NumPy."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from tests.numbers import same

START = np.arange(12, dtype="float32").reshape(4, 3)


@pytest.fixture
def table():
    return keras.Variable(START)


def batches(*shape, count=3):
    """Whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(0).integers(-9, 9, (count, *shape)).astype("float32")


def add_and_subtract(table, x):
    table.assign_add(x)
    table.assign_sub(2 * table)


# By name: the shape of a batch, the step, and the values after it in NumPy.
ASSIGN = {
    "assign": ((4, 3), lambda table, x: table.assign(2 * table + x), lambda values, x: 2 * values + x),
    "assign_add and assign_sub": ((4, 3), add_and_subtract, lambda values, x: -(values + x)),
    "slice_update": (
        (2, 3),
        lambda table, x: table.assign(ops.slice_update(table.value, (1, 0), x)),
        lambda values, x: np.concatenate([values[:1], x, values[3:]]),
    ),
}


@pytest.mark.parametrize(("shape", "assign", "in_numpy"), ASSIGN.values(), ids=ASSIGN)
def test_f2_assign_in_a_function_is_as_in_numpy(shape, assign, in_numpy, table, eagerly, shown):
    @hl.function
    def step(x):
        before = ops.copy(table.value)
        assign(table, x)
        return before, ops.copy(table.value)

    expected = START
    for x in batches(*shape):
        before, after = step(x)
        same(before, expected)
        expected = in_numpy(expected, x)
        same(after, expected)
        same(table, expected)
    shown("assigned, sliced and scattered: equal to NumPy")


def test_f2_assign_of_a_slice_at_a_position_from_a_variable_is_compiled_once(table, eagerly):
    """A ring of the last rows."""
    count = keras.Variable(0, dtype="int32", trainable=False)

    @hl.function
    def step(row):
        table.assign(ops.slice_update(table.value, (count.value % 4, 0), row))
        count.assign_add(1)

    expected = START.copy()
    for index, row in enumerate(batches(1, 3, count=6)):
        step(row)
        expected[index % 4] = row[0]
        same(table, expected)
    assert int(count) == 6
    assert len(step.traces) == (0 if eagerly else 1)


def test_f2_assign_of_a_scatter_update(table, eagerly):
    @hl.function
    def step(indices, x):
        table.assign(ops.scatter_update(table.value, indices, x))

    expected = START.copy()
    for indices, x in zip([[[0, 1], [3, 2]], [[2, 0], [0, 1]]], batches(2, count=2), strict=True):
        step(np.array(indices, "int32"), x)
        expected[tuple(np.transpose(indices))] = x
        same(table, expected)


def sums_by_class(table, added):
    """Runs a step that adds rows of data to the rows of a table by class, and checks the sums; returns the traces."""

    @hl.function
    def step(labels, x):
        table.assign(added(table.value, labels[:, None], x))

    expected = START.copy()
    for labels, x in zip([[1, 1, 3, 1, 0], [2, 2, 2, 2, 2]], batches(5, 3, count=2), strict=True):
        step(np.array(labels, "int32"), x)
        np.add.at(expected, labels, x)
        same(table, expected)
    return [trace.compiled for trace in step.traces]


def scatter_into(values, indices, x):
    return ops.scatter_update(values, indices, x, reduction="add")


def scatter_beside(values, indices, x):
    return values + ops.scatter(indices, x, (4, 3))


@pytest.mark.skipif("reduction" not in inspect.signature(ops.scatter_update).parameters, reason="Keras 3.13 has none")
def test_f2_assign_of_scattered_sums_counts_repeated_indices(table, eagerly):
    assert sums_by_class(table, scatter_into) == ([] if eagerly else [True])


@pytest.mark.backend("jax", "tensorflow")
def test_f2_function_compiles_scatter(table, eagerly):
    assert sums_by_class(table, scatter_beside) == ([] if eagerly else [True])


@pytest.mark.backend("torch")
def test_f2_function_compiles_scatter_on_torch_or_falls_back_with_a_warning(table):
    """Before 3.16, `scatter` of Keras is a Python loop over the indices; `scatter_update` with a reduction is not."""
    with hl.checks.collect() as findings:
        traces = sums_by_class(table, scatter_beside)
    assert traces == [not findings]
    assert all("falls back to eager execution" in finding.saw + finding.why for finding in findings)
    with hl.run_eagerly(True):
        table.assign(START)
        sums_by_class(table, scatter_beside)


def test_f2_minimize_gives_gradients_to_the_parts_that_a_scatter_update_kept(table, eagerly):
    optimizer = keras.optimizers.SGD(0.5)

    @hl.function
    def step(x):
        return hl.minimize(lambda: ops.sum(ops.square(ops.scatter_update(table.value, [[1]], x))), table, optimizer)

    expected = START.copy()
    for x in batches(1, 3):
        replaced = expected.copy()
        replaced[1] = x[0]
        assert float(step(x)) == np.sum(replaced**2)
        expected[[0, 2, 3]] = 0  # w - 0.5 * 2 * w
        same(table, expected)
