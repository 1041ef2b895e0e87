"""Conflicting gradients are projected as the paper says, whatever else belongs to the loss."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import GradientError
from handloom.optimizers import GradientAccumulation, LossScaleOptimizer, PCGrad

START = np.array([1.0, -2.0, 0.5], "float32")


def linear_losses(directions):
    """A variable, and losses whose gradients are these, wherever it stands."""
    w = keras.Variable(START)
    return w, lambda: ops.sum(ops.convert_to_tensor(np.array(directions, "float32")) * w, axis=1)


def projected(gradients, orders):
    """Algorithm 1 of Yu et al., with the orders given."""
    total = np.zeros(len(gradients[0]))
    for gradient, order in zip(gradients, orders, strict=True):
        changed = np.array(gradient, float)
        for other in order:
            product = changed @ gradients[other]
            if product < 0:
                changed = changed - product / (gradients[other] @ gradients[other]) * gradients[other]
        total += changed
    return total


def step_of(optimizer, w, loss_fn):
    loss = hl.function(lambda: hl.minimize(loss_fn, w, optimizer))()
    return float(loss), START - ops.convert_to_numpy(w.value)


def test_two_conflicting_gradients_lose_their_parts_along_each_other(eagerly):
    a, b = np.array([1.0, 0.0, 0.0]), np.array([-1.0, 1.0, 0.0])
    w, losses = linear_losses([a, b])
    loss, moved = step_of(PCGrad(keras.optimizers.SGD(1.0)), w, losses)
    np.testing.assert_allclose(moved, [0.5, 1.5, 0.0], atol=1e-6)  # a + b/2 and b + a.
    np.testing.assert_allclose(loss, START @ (a + b), rtol=1e-6)


def test_gradients_without_a_conflict_are_summed(eagerly):
    a, b = np.array([1.0, 2.0, 0.0]), np.array([0.5, 0.0, 3.0])
    w, losses = linear_losses([a, b])
    np.testing.assert_allclose(step_of(PCGrad(keras.optimizers.SGD(1.0)), w, losses)[1], a + b, atol=1e-6)


def test_three_gradients_are_projected_in_one_of_the_orders_of_the_paper():
    gradients = np.array([[1.0, 0.3, 0.0], [-1.0, 0.4, 0.6], [0.2, -1.0, -0.8]])
    orders = [list(itertools.permutations([other for other in range(3) if other != task])) for task in range(3)]
    possible = [projected(gradients, chosen) for chosen in itertools.product(*orders)]
    optimizer, seen = PCGrad(keras.optimizers.SGD(1.0)), []
    w, losses = linear_losses(gradients)
    step = hl.function(lambda: hl.minimize(losses, w, optimizer))
    for _ in range(12):
        w.assign(START)
        step()
        moved = START - ops.convert_to_numpy(w.value)
        distances = [np.abs(moved - sum_).max() for sum_ in possible]
        assert min(distances) < 1e-5
        seen.append(int(np.argmin(distances)))
    assert len(set(seen)) > 1


def test_penalties_are_added_unprojected():
    x = np.eye(2, dtype="float32")
    layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5))
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [2.0]])
    before = ops.convert_to_numpy(layer.kernel.value)

    def losses():
        first, second = ops.unstack(ops.reshape(layer(x), (2,)))
        return ops.stack([first, second - 2 * first])

    total = hl.minimize(losses, layer, PCGrad(keras.optimizers.SGD(0.1)))
    # Of (1, 0) and (-2, 1): the first loses its part along the second, the second that along the first.
    expected = np.array([[1 - 2 / 5 * 2 + 0], [2 / 5 + 1]]) + before
    np.testing.assert_allclose((before - ops.convert_to_numpy(layer.kernel.value)) / 0.1, expected, rtol=1e-5)
    np.testing.assert_allclose(float(total), 1 + (2 - 2) + 0.5 * (1 + 4), rtol=1e-6)


def test_a_loss_that_does_not_reach_all_variables_leaves_them_to_the_others():
    a, b = keras.Variable(1.0), keras.Variable(1.0)
    hl.minimize(lambda: ops.stack([a * 2.0, a * -1.0 + b]), [a, b], PCGrad(keras.optimizers.SGD(1.0)))
    # (2, 0) and (-1, 1): the first becomes (1, 1), the second (0, 1).
    np.testing.assert_allclose([ops.convert_to_numpy(v.value) for v in (a, b)], [1 - 1, 1 - 2], atol=1e-6)


def test_its_gradients_are_gathered_by_accumulation_around_it(eagerly):
    w, losses = linear_losses([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    optimizer = GradientAccumulation(PCGrad(keras.optimizers.SGD(1.0)), 2)
    step = hl.function(lambda: hl.minimize(losses, w, optimizer))
    step()
    np.testing.assert_array_equal(ops.convert_to_numpy(w.value), START)
    step()
    np.testing.assert_allclose(START - ops.convert_to_numpy(w.value), [0.5, 1.5, 0.0], atol=1e-5)


def test_scaled_losses_are_projected_alike(eagerly):
    w, losses = linear_losses([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    optimizer = PCGrad(LossScaleOptimizer(keras.optimizers.SGD(1.0)))
    loss, moved = step_of(optimizer, w, losses)
    np.testing.assert_allclose([*moved, loss], [0.5, 1.5, 0.0, 1 - 3], atol=1e-5)


def test_what_else_a_loss_function_does_happens_once_and_its_aux_comes_back(eagerly):
    w, losses = linear_losses([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    calls = keras.Variable(0.0)

    def with_aux():
        calls.assign_add(1.0)
        return losses(), {"losses": losses()}

    optimizer = PCGrad(keras.optimizers.SGD(1.0))
    loss, aux = hl.function(lambda: hl.minimize(with_aux, w, optimizer, has_aux=True))()
    np.testing.assert_allclose(aux["losses"], [1, -3], rtol=1e-6)
    np.testing.assert_allclose([loss, ops.convert_to_numpy(calls.value)], [-2, 1])


def test_one_loss_is_an_error_that_shows_how_to_give_several():
    w = keras.Variable(START)
    with pytest.raises(GradientError, match=r"one vector, keras.ops.stack\(\[a, b\]\); .* shape \(\)"):
        hl.minimize(lambda: ops.sum(w), w, PCGrad("sgd"))
    with pytest.raises(GradientError, match=r"shape \(2,\)"):
        hl.minimize(lambda: ops.stack([w[0], w[1]]), w, keras.optimizers.SGD())


def test_it_is_saved_and_loaded_as_it_is():
    optimizer = PCGrad(keras.optimizers.SGD(0.5), seed=3)
    loaded = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert (type(loaded), loaded.seed, float(loaded.learning_rate)) == (PCGrad, 3, 0.5)
