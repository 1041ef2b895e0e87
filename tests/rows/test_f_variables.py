"""Row F2: variables assigned within a step, wholly, in part and here and there: as in NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.errors import FallbackWarning

START = np.arange(12, dtype="float32").reshape(4, 3)


@pytest.fixture
def table():
    return keras.Variable(START)


def same(variable, expected):
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), expected)


def batches(*shape, count=3):
    """Whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(0).integers(-9, 9, (count, *shape)).astype("float32")


def test_f2_assign(table, eagerly, shown):
    @hl.function
    def step(x):
        before = ops.copy(table.value)
        table.assign(2 * table + x)
        return before, ops.copy(table.value)

    expected = START
    for x in batches(4, 3):
        before, after = step(x)
        same(before, expected)
        expected = 2 * expected + x
        same(after, expected)
        same(table, expected)
    shown("assigned, sliced and scattered: equal to NumPy")


def test_f2_assign_add_and_assign_sub(table, eagerly):
    @hl.function
    def step(x):
        table.assign_add(x)
        table.assign_sub(2 * table)

    expected = START
    for x in batches(4, 3):
        step(x)
        expected = expected + x
        expected = expected - 2 * expected
        same(table, expected)


def test_f2_a_part_is_assigned_at_a_place_that_is_known(table, eagerly):
    @hl.function
    def step(x):
        table.assign(ops.slice_update(table.value, (1, 0), x))

    for x in batches(2, 3):
        step(x)
    same(table, np.concatenate([START[:1], x, START[3:]]))


def test_f2_a_part_is_assigned_at_a_place_that_the_data_gives(table, eagerly):
    """A ring of rows, as of the last examples seen; it is compiled once, wherever it writes."""
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


def test_f2_scattered_updates(table, eagerly):
    @hl.function
    def step(indices, x):
        table.assign(ops.scatter_update(table.value, indices, x))

    expected = START.copy()
    for indices, x in zip([[[0, 1], [3, 2]], [[2, 0], [0, 1]]], batches(2), strict=False):
        step(np.array(indices, "int32"), x)
        expected[tuple(np.transpose(indices))] = x
        same(table, expected)


def sums_by_class(table, added):
    """Runs a step that adds rows of data to those of a table by their class, and checks it; returns the step."""

    @hl.function
    def step(labels, x):
        table.assign(added(table.value, labels[:, None], x))

    expected = START.copy()
    for labels, x in zip([[1, 1, 3, 1, 0], [2, 2, 2, 2, 2]], batches(5, 3), strict=False):
        step(np.array(labels, "int32"), x)
        np.add.at(expected, labels, x)
        same(table, expected)
    return step


def in_place(values, indices, x):
    return ops.scatter_update(values, indices, x, reduction="add")


def beside(values, indices, x):
    return values + ops.scatter(indices, x, (4, 3))


def test_f2_scattered_sums_count_what_comes_twice_twice(table, eagerly):
    step = sums_by_class(table, in_place)
    assert [trace.compiled for trace in step.traces] == ([] if eagerly else [True])


def test_f2_scatter_op_by_op(table):
    with hl.run_eagerly(True):
        sums_by_class(table, beside)


@pytest.mark.backend("jax", "tensorflow")
def test_f2_scatter_compiled(table):
    assert [trace.compiled for trace in sums_by_class(table, beside).traces] == [True]


@pytest.mark.backend("torch")
def test_f2_scatter_falls_back_on_torch_and_says_so(table):
    """Keras's is a Python loop over the indices there; `scatter_update` with a reduction is none."""
    with pytest.warns(FallbackWarning, match="falls back to eager execution"):
        sums_by_class(table, beside)


def test_f2_a_variable_of_whole_numbers(eagerly):
    counts = keras.Variable(np.zeros(10, "int32"), dtype="int32", trainable=False)

    @hl.function
    def step(labels):
        counts.assign_add(ops.sum(ops.one_hot(labels, 10, dtype="int32"), axis=0))

    seen = np.random.default_rng(0).integers(0, 10, (4, 32)).astype("int32")
    for labels in seen:
        step(labels)
    same(counts, np.bincount(seen.ravel(), minlength=10))
    assert keras.backend.standardize_dtype(counts.dtype) == "int32"


def test_f2_assigned_parts_within_a_training_step(table, eagerly):
    """Gradients arrive at the parts that were not replaced."""
    optimizer = keras.optimizers.SGD(0.5)

    @hl.function
    def step(x):
        def loss_fn():
            return ops.sum(ops.square(ops.scatter_update(table.value, [[1]], x)))

        return hl.minimize(loss_fn, table, optimizer)

    expected = START.copy()
    for x in batches(1, 3):
        replaced = expected.copy()
        replaced[1] = x[0]
        assert float(step(x)) == np.sum(replaced**2)
        expected[[0, 2, 3]] = 0  # w - 0.5 * 2 * w
        same(table, expected)
