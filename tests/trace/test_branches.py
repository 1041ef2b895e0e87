"""Branches of `keras.ops.cond` that assign variables: the chosen one takes effect, the other leaves no trace."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl


def number(value):
    return float(ops.convert_to_numpy(value))


def put(variable, value):
    """Assigns, and gives nothing: both branches must give the same structure."""
    variable.assign(value)


def put_into(metric, value):
    metric.update_state(value)


@pytest.fixture
def v():
    return keras.Variable(2.0, name="v")


@pytest.fixture
def w():
    return keras.Variable(5.0, name="w")


UP, DOWN = np.float32(1), np.float32(-1)


def test_the_branch_that_is_chosen_assigns(v, w, eagerly):
    @hl.function
    def step(x):
        ops.cond(x > 0, lambda: put(v, v + x), lambda: put(w, w * 2))
        return v + w

    found = [(number(step(x)), number(v), number(w)) for x in (UP, DOWN, UP)]
    assert found == [(8, 3, 5), (13, 3, 10), (14, 4, 10)]


def test_a_branch_may_give_a_value_and_assign(v, eagerly):
    def add():
        v.assign_add(1.0)
        return {"doubled": v * 2, "kept": [v + 0.0]}

    step = hl.function(lambda x: ops.cond(x > 0, add, lambda: {"doubled": -v.value, "kept": [v * 0]}))
    found = [[number(leaf) for leaf in keras.tree.flatten(step(x))] + [number(v)] for x in (UP, DOWN)]
    assert found == [[6, 3, 3], [-3, 0, 3]]


def test_a_variable_assigned_twice_in_a_branch_has_the_last_value(v, eagerly):
    def twice():
        v.assign(v * 10)
        v.assign(v + 1)

    step = hl.function(lambda x: ops.cond(x > 0, twice, lambda: None))
    found = []
    for x in (DOWN, UP):
        step(x)
        found.append(number(v))
    assert found == [2, 21]


def test_a_branch_sees_what_was_assigned_before_it_and_what_follows_sees_the_branch(v, eagerly):
    @hl.function
    def step(x):
        v.assign(v + 1)
        ops.cond(x > 0, lambda: put(v, v * 10), lambda: None)
        v.assign(v + 0.5)
        return v.value

    assert [number(step(x)) for x in (UP, DOWN)] == [30.5, 32]


def test_a_branch_in_a_branch_assigns(v, w, eagerly):
    def inner(x):
        v.assign(v + 1)
        ops.cond(x > 5, lambda: put(w, v * 100), lambda: put(v, v + 10))

    step = hl.function(lambda x: ops.cond(x > 0, lambda: inner(x), lambda: put(w, w - 1)))
    found = []
    for x in (10, 1, -1):
        step(np.float32(x))
        found.append((number(v), number(w)))
    assert found == [(3, 300), (14, 300), (14, 299)]


def test_a_metric_in_a_branch_counts_what_went_through_it(eagerly):
    mean = keras.metrics.Mean()
    step = hl.function(lambda x: ops.cond(x > 0, lambda: put_into(mean, x), lambda: None))
    for x in (4, -1, 8):
        step(np.float32(x))
    assert number(mean.result()) == 6


def test_an_optimizer_in_a_branch_updates_when_it_is_chosen(w, eagerly):
    optimizer = keras.optimizers.Adam(0.5)
    optimizer.build([w])

    @hl.function
    def step(x):
        ops.cond(x > 0, lambda: optimizer.apply([ops.ones(())], [w]), lambda: None)

    step(DOWN)
    assert [number(w), int(number(optimizer.iterations))] == [5, 0]
    step(UP)
    assert [pytest.approx(4.5, rel=1e-5), 1] == [number(w), int(number(optimizer.iterations))]
    assert [number(slot) for slot in optimizer.variables[2:]] == pytest.approx([0.1, 0.001], rel=1e-4)


def test_a_branch_may_differentiate_and_assign(w, eagerly):
    def descend():
        loss, gradient = hl.value_and_grad(lambda: w**2, wrt=w)()
        w.assign(w - 0.1 * gradient)
        return loss

    step = hl.function(lambda x: ops.cond(x > 0, descend, lambda: ops.zeros(())))
    assert [number(step(x)) for x in (UP, DOWN, UP)] == pytest.approx([25, 0, 16])
    assert number(w) == pytest.approx(3.2)


def test_a_branch_that_assigns_may_be_differentiated_through(v, w, eagerly):
    """What it assigns is assigned once, and what it gives has its gradient."""

    def count(value):
        v.assign_add(1.0)
        return value

    @hl.function
    def step(x):
        return hl.value_and_grad(lambda: ops.cond(x > 0, lambda: count(w**2), lambda: 7 * w), wrt=w)()

    found = [[number(part) for part in step(x)] + [number(v)] for x in (UP, DOWN, UP)]
    assert found == [[25, 10, 3], [35, 7, 3], [25, 10, 4]]


def test_a_branch_in_a_loss_is_minimized_and_counts_once(v, eagerly):
    layer, optimizer = layers.Dense(1, use_bias=False, kernel_initializer="ones"), keras.optimizers.SGD(0.5)
    layer.build((None, 1))

    def loss(x):
        def far():
            v.assign_add(1.0)
            return ops.sum(layer(x))

        return ops.cond(ops.sum(x) > 0, far, lambda: ops.sum(layer(x) ** 2))

    step = hl.function(lambda x: hl.minimize(lambda: loss(x), layer, optimizer))
    kernels = []
    for x in (2, -1):
        step(np.full((1, 1), x, "float32"))
        kernels.append(number(layer.kernel[0, 0]))
    assert kernels == [0.0, 0.0]  # 1 - 0.5 * 2, then 0 - 0.5 * 2 * 0.
    assert number(v) == 3


def test_a_choice_known_to_python_is_made_by_python(v, eagerly):
    step = hl.function(lambda: ops.cond(True, lambda: put(v, v + 1), lambda: put(v, v - 1)))
    step()
    assert number(v) == 3
