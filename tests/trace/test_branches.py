"""Branches of `keras.ops.cond` that assign variables: only the chosen branch takes effect."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.models import built
from tests.numbers import close, numpy

UP, DOWN = np.float32(1), np.float32(-1)
# The fixtures `v` and `w` are variables at 2 and at 5.


def put(variable, value):
    """Assigns and returns nothing, as both branches must return the same structure."""
    variable.assign(value)


def after(step, *arguments, of):
    """The values of some variables after each call of a step."""
    found = []
    for argument in arguments:
        step(np.float32(argument))
        found.append([numpy(variable).tolist() for variable in of])
    return found


def test_cond_assigns_in_the_chosen_branch(v, w, eagerly):
    step = hl.function(lambda x: ops.cond(x > 0, lambda: put(v, v + x), lambda: put(w, w * 2)))
    assert after(step, 1, -1, 1, of=[v, w]) == [[3, 5], [3, 10], [4, 10]]


def test_cond_returns_a_structure_and_assigns(v, eagerly):
    def add():
        v.assign_add(1.0)
        return {"doubled": v * 2, "kept": [v + 0.0]}

    step = hl.function(lambda x: ops.cond(x > 0, add, lambda: {"doubled": -v.value, "kept": [v * 0]}))
    close([[*keras.tree.flatten(step(x)), v] for x in (UP, DOWN)], [[6, 3, 3], [-3, 0, 3]])


def test_cond_keeps_the_last_of_two_values_assigned_in_a_branch(v, eagerly):
    def twice():
        v.assign(v * 10)
        v.assign(v + 1)

    assert after(hl.function(lambda x: ops.cond(x > 0, twice, lambda: None)), -1, 1, of=[v]) == [[2], [21]]


def test_cond_sees_assignments_before_it_and_the_step_sees_those_of_the_branch(v, eagerly):
    @hl.function
    def step(x):
        v.assign(v + 1)
        ops.cond(x > 0, lambda: put(v, v * 10), lambda: None)
        v.assign(v + 0.5)
        return v.value

    close([step(UP), step(DOWN)], [30.5, 32])


def test_cond_in_a_branch_assigns(v, w, eagerly):
    def inner(x):
        v.assign(v + 1)
        ops.cond(x > 5, lambda: put(w, v * 100), lambda: put(v, v + 10))

    step = hl.function(lambda x: ops.cond(x > 0, lambda: inner(x), lambda: put(w, w - 1)))
    assert after(step, 10, 1, -1, of=[v, w]) == [[3, 300], [14, 300], [14, 299]]


def test_cond_updates_a_metric_in_the_chosen_branch(eagerly):
    mean = keras.metrics.Mean()

    def update(x):
        mean.update_state(x)

    after(hl.function(lambda x: ops.cond(x > 0, lambda: update(x), lambda: None)), 4, -1, 8, of=[])
    close(mean.result(), 6)


def test_cond_updates_by_an_optimizer_in_the_chosen_branch(w, eagerly):
    optimizer = keras.optimizers.Adam(0.5)
    optimizer.build([w])
    step = hl.function(lambda x: ops.cond(x > 0, lambda: optimizer.apply([ops.ones(())], [w]), lambda: None))
    step(DOWN)
    close([w, optimizer.iterations], [5, 0])
    step(UP)
    close([w, optimizer.iterations, *optimizer.variables[2:]], [4.5, 1, 0.1, 0.001], rtol=1e-4)


def test_cond_differentiates_and_assigns_in_a_branch(w, eagerly):
    def descend():
        loss, gradient = hl.value_and_grad(lambda: w**2, wrt=w)()
        w.assign(w - 0.1 * gradient)
        return loss

    step = hl.function(lambda x: ops.cond(x > 0, descend, lambda: ops.zeros(())))
    close([step(UP), step(DOWN), step(UP), w], [25, 0, 16, 3.2])


def test_value_and_grad_through_a_branch_assigns_once(v, w, eagerly):
    def count(value):
        v.assign_add(1.0)
        return value

    @hl.function
    def step(x):
        return hl.value_and_grad(lambda: ops.cond(x > 0, lambda: count(w**2), lambda: 7 * w), wrt=w)()

    close([[*step(x), numpy(v)] for x in (UP, DOWN, UP)], [[25, 10, 3], [35, 7, 3], [25, 10, 4]])


def test_minimize_with_a_branch_in_the_loss_assigns_once(v, eagerly):
    layer = built(layers.Dense(1, use_bias=False, kernel_initializer="ones"), 1)
    optimizer = keras.optimizers.SGD(0.5)

    def loss(x):
        def far():
            v.assign_add(1.0)
            return ops.sum(layer(x))

        return ops.cond(ops.sum(x) > 0, far, lambda: ops.sum(layer(x) ** 2))

    step = hl.function(lambda x: hl.minimize(lambda: loss(ops.reshape(x, (1, 1))), layer, optimizer))
    # 1 - 0.5 * 2, then 0 - 0.5 * 2 * 0.
    assert after(step, 2, -1, of=[layer.kernel, v]) == [[[[0]], 3], [[[0]], 3]]


@pytest.mark.parametrize(("choice", "expected"), [(True, 3), (False, 1)])
def test_cond_on_a_python_bool_runs_one_branch(choice, expected, v, eagerly):
    hl.function(lambda: ops.cond(choice, lambda: put(v, v + 1), lambda: put(v, v - 1)))()
    close(v, expected)
