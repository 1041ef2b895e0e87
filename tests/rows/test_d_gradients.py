"""Rows D: gradients."""
# ruff: noqa: PLC0415  A framework's own module is for the one test that runs on it.

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops
from sklearn.datasets import load_digits

import handloom as hl
from tests.rows.figures import below


def f(w1, w2):
    return 3 * w1**2 + 2 * w1 * w2


def numbers(values):
    """Gradients as floats, in lists as deep as they came; what is not reached stays `None`."""
    if isinstance(values, (list, tuple)):
        return [numbers(value) for value in values]
    return None if values is None else float(values)


def test_d1_a_gradient_with_respect_to_variables(eagerly, shown):
    w1, w2 = keras.Variable(5.0), keras.Variable(3.0)
    gradients = hl.function(hl.grad(lambda: f(w1, w2), wrt=[w1, w2]))()
    assert numbers(gradients) == [36, 10]
    shown(f"{numbers(gradients)}")


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32))
def test_d1_finite_differences_agree(a, b):
    h = 1e-6
    differences = [(f(a + h, b) - f(a - h, b)) / (2 * h), (f(a, b + h) - f(a, b - h)) / (2 * h)]
    np.testing.assert_allclose(numbers(hl.grad(f, wrt=(0, 1))(a, b)), differences, rtol=1e-4, atol=1e-4)


def test_d2_several_gradients_of_one_function_with_respect_to_plain_tensors(eagerly, shown):
    def gradients(w1, w2):
        return hl.grad(f, wrt=0)(w1, w2), hl.grad(f, wrt=1)(w1, w2), hl.grad(f, wrt=(0, 1))(w1, w2)

    found = hl.function(gradients)(np.float32(5), np.float32(3))
    assert numbers(found) == [36, 10, [36, 10]]
    shown(f"{numbers(found)}")


def test_d2_what_is_not_reached_has_no_gradient(eagerly, shown):
    w1, bystander = keras.Variable(5.0), keras.Variable(7.0)

    def gradients(w2, constant):
        of_tensors = hl.grad(lambda w2, constant: f(w1, w2), wrt=(0, 1))(w2, constant)
        of_variables = hl.grad(lambda: f(w1, w2), wrt=[w1, bystander])()
        return of_tensors, of_variables

    found = numbers(hl.function(gradients)(np.float32(3), np.float32(1)))
    assert found == [[10, None], [36, None]]
    shown(f"not reached: {found}")


def test_d3_second_order(eagerly, shown):
    w1, w2 = keras.Variable(5.0), keras.Variable(3.0)
    found = numbers(hl.function(hl.hessian(lambda: f(w1, w2), wrt=[w1, w2]))())
    assert found == [[6, 2], [2, None]]
    shown(f"{found}")


def test_d3_second_order_as_a_gradient_of_a_gradient(eagerly):
    w1, w2 = keras.Variable(5.0), keras.Variable(3.0)
    first = hl.grad(lambda: f(w1, w2), wrt=[w1, w2])

    @hl.function
    def second():
        return [hl.grad(lambda: first()[0], wrt=[w1, w2])(), hl.grad(lambda: first()[1], wrt=[w1, w2])()]

    assert numbers(second()) == [[6, 2], [2, None]]


def test_d4_stop_gradient_on_the_second_term(eagerly, shown):
    w1, w2 = keras.Variable(5.0), keras.Variable(3.0)
    stopped = hl.grad(lambda: 3 * w1**2 + ops.stop_gradient(2 * w1 * w2), wrt=(w1, w2))
    found = numbers(hl.function(stopped)())
    assert found == [30, None]
    shown(f"{found}")


def naive_softplus(z):
    return ops.log(ops.exp(z) + 1)


@ops.custom_gradient
def softplus_with_its_gradient(z):
    exp = ops.exp(z)

    def backward(*args, upstream=None):
        # PyTorch passes the inputs, and what comes from above by name; the others that alone.
        if upstream is None:
            (upstream,) = args
        return upstream * (1 - 1 / (1 + exp))

    return ops.log(exp + 1), backward


def stable_softplus(z):
    return ops.where(z > 30, z, ops.log(ops.exp(ops.minimum(z, 30.0)) + 1))


def test_d5_the_naive_gradient_overflows_to_nan(eagerly, shown):
    slope = float(hl.function(hl.grad(naive_softplus))(np.float32(100)))
    assert np.isnan(slope)
    shown(f"naive: {slope}")


@pytest.mark.parametrize("z", [100.0, 1.0, -2.0])
def test_d5_a_custom_gradient_is_right(eagerly, z, shown):
    slope = hl.function(hl.grad(softplus_with_its_gradient))(np.float32(z))
    assert float(slope) == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-6)  # 1.0 at 100, to the last bit.
    if z == 100:
        shown(f"custom gradient: {float(slope)}")


def test_d5_keras_own_softplus_has_the_gradient_1(eagerly):
    assert float(hl.function(hl.grad(ops.softplus))(np.float32(100))) == 1.0


def test_d5_the_stable_forward_gives_100(eagerly, shown):
    value, slope = hl.function(hl.value_and_grad(stable_softplus))(np.float32(100))
    assert (float(value), float(slope)) == (100.0, 1.0)
    shown(f"stable: {float(value)}, slope {float(slope)}")


def critic_of(sizes):
    # Slopes far from 1 to begin with.
    wide = keras.initializers.RandomNormal(stddev=0.5)
    critic = [layers.Dense(size, activation="tanh", kernel_initializer=wide) for size in sizes]
    critic.append(layers.Dense(1, kernel_initializer=wide))
    through(critic, np.zeros((1, 64), "float32"))
    return critic


def through(critic, x):
    for layer in critic:
        x = layer(x)
    return x


def penalty_of(critic, at):
    """How far the slope of a critic is from 1, at given points (Gulrajani et al., 2017)."""
    slopes = hl.grad(lambda x: ops.sum(through(critic, x)))(at)
    return ops.mean((ops.sqrt(ops.sum(slopes**2, axis=-1)) - 1) ** 2)


def loss_with_penalty(critic, first, real, drawn):
    """The loss of a Wasserstein critic, its slope penalized at what layer number `first` is given."""
    far = penalty_of(critic[first:], through(critic[:first], (real + drawn) / 2))
    return ops.mean(through(critic, drawn)) - ops.mean(through(critic, real)) + 10 * far, far


def digits_and_noise(count):
    real = (load_digits().data[:count] / 8 - 1).astype("float32")
    return real, np.random.default_rng(0).uniform(-1, 1, real.shape).astype("float32")


@pytest.mark.parametrize("first", [0, 1], ids=["inputs", "activations"])
def test_d6_a_penalty_on_the_gradient_trains(first, shown):
    critic, optimizer = critic_of([16, 16]), keras.optimizers.Adam(1e-2)

    @hl.function
    def train_step(real, drawn):
        return hl.minimize(lambda: loss_with_penalty(critic, first, real, drawn), critic, optimizer, has_aux=True)

    data = digits_and_noise(32)
    history = np.array([numbers(train_step(*data)) for _ in range(100)])
    losses, penalties = history.T
    assert losses[-1] < losses[0]
    assert penalties[-1] < penalties[0] / 10
    shown(f"penalty from {penalties[0]:.2f} to below a tenth")


def critic_by_hand(weights, x, tanh):
    *hidden, (kernel, bias) = zip(weights[::2], weights[1::2], strict=True)
    for inner_kernel, inner_bias in hidden:
        x = tanh(x @ inner_kernel + inner_bias)
    return x @ kernel + bias


def input_slopes_by_hand(weights, x):
    """The chain rule through two hidden layers, backwards."""
    w1, b1, w2, b2, w3, _ = weights
    h1 = np.tanh(x @ w1 + b1)
    h2 = np.tanh(h1 @ w2 + b2)
    return (((1 - h2**2) * w3[:, 0]) @ w2.T * (1 - h1**2)) @ w1.T


def loss_by_hand(weights, real, drawn):
    slopes = input_slopes_by_hand(weights, (real + drawn) / 2)
    far = np.mean((np.sqrt(np.sum(slopes**2, axis=-1)) - 1) ** 2)
    judged = [critic_by_hand(weights, x, np.tanh) for x in (drawn, real)]
    return judged[0].mean() - judged[1].mean() + 10 * far


def test_d6_the_gradient_through_a_penalty_is_that_of_finite_differences():
    critic, (real, drawn) = critic_of([3, 2]), digits_and_noise(8)
    gradients = hl.function(hl.grad(lambda: loss_with_penalty(critic, 0, real, drawn)[0], wrt=critic))()
    weights = [weight.astype("float64") for layer in critic for weight in layer.get_weights()]
    for gradient, weight in zip(keras.tree.flatten(gradients), weights, strict=True):
        differences = np.empty_like(weight)
        for place in np.ndindex(weight.shape):
            kept, losses = weight[place], []
            for h in (1e-6, -1e-6):
                weight[place] = kept + h
                losses.append(loss_by_hand(weights, real.astype("float64"), drawn))
            weight[place] = kept
            differences[place] = (losses[0] - losses[1]) / 2e-6
        np.testing.assert_allclose(ops.convert_to_numpy(gradient), differences, rtol=1e-3, atol=1e-4)


def gradients_by_hand_in_jax(weights, real, drawn):
    import jax
    import jax.numpy as jnp

    def loss(weights):
        slopes = jax.grad(lambda x: critic_by_hand(weights, x, jnp.tanh).sum())((real + drawn) / 2)
        far = jnp.mean((jnp.linalg.norm(slopes, axis=-1) - 1) ** 2)
        judged = [critic_by_hand(weights, x, jnp.tanh).mean() for x in (drawn, real)]
        return judged[0] - judged[1] + 10 * far

    return jax.grad(loss)(weights)


def gradients_by_hand_in_torch(weights, real, drawn):
    import torch

    weights = [torch.tensor(weight, requires_grad=True) for weight in weights]
    real, drawn = torch.tensor(real), torch.tensor(drawn)
    between = ((real + drawn) / 2).requires_grad_()
    [slopes] = torch.autograd.grad(critic_by_hand(weights, between, torch.tanh).sum(), between, create_graph=True)
    far = ((slopes.norm(dim=-1) - 1) ** 2).mean()
    judged = [critic_by_hand(weights, x, torch.tanh).mean() for x in (drawn, real)]
    return torch.autograd.grad(judged[0] - judged[1] + 10 * far, weights)


def gradients_by_hand_in_tensorflow(weights, real, drawn):
    import tensorflow as tf

    weights, between = [tf.constant(weight) for weight in weights], tf.constant((real + drawn) / 2)
    with tf.GradientTape() as outer:
        outer.watch(weights)
        with tf.GradientTape() as inner:
            inner.watch(between)
            judged = tf.reduce_sum(critic_by_hand(weights, between, tf.tanh))
        far = tf.reduce_mean((tf.norm(inner.gradient(judged, between), axis=-1) - 1) ** 2)
        judged = [tf.reduce_mean(critic_by_hand(weights, x, tf.tanh)) for x in (drawn, real)]
        loss = judged[0] - judged[1] + 10 * far
    return outer.gradient(loss, weights)


@pytest.mark.parametrize(
    "by_hand",
    [
        pytest.param(gradients_by_hand_in_jax, marks=pytest.mark.backend("jax"), id="jax"),
        pytest.param(gradients_by_hand_in_tensorflow, marks=pytest.mark.backend("tensorflow"), id="tensorflow"),
        pytest.param(gradients_by_hand_in_torch, marks=pytest.mark.backend("torch"), id="torch"),
    ],
)
def test_d6_the_gradient_through_a_penalty_is_that_of_the_framework_by_hand(eagerly, by_hand, shown):
    critic, data = critic_of([16, 16]), digits_and_noise(32)
    gradients = hl.function(hl.grad(lambda *data: loss_with_penalty(critic, 0, *data)[0], wrt=critic))(*data)
    expected = by_hand([weight for layer in critic for weight in layer.get_weights()], *data)
    for gradient, right in zip(keras.tree.flatten(gradients), expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(gradient), ops.convert_to_numpy(right), rtol=1e-4, atol=1e-5)
    shown("gradients as by hand in the framework")


INNER_RATE, OUTER_RATE = 0.1, 0.05


def quadratic(theta, curvature, minimum):
    return ops.sum((theta - minimum) * ops.matmul(curvature, theta - minimum)) / 2


def test_d7_the_gradient_through_an_update_is_the_closed_form(eagerly, shown):
    """Of q2(t - r q1'(t)), with qi(t) = (t - mi) Hi (t - mi) / 2, that is (1 - r H1) H2 (t' - m2)."""
    random = np.random.default_rng(0)
    roots, (start, *minima) = random.normal(size=(2, 3, 3)), random.normal(size=(3, 3))
    h1, h2 = roots @ roots.swapaxes(1, 2)
    theta, optimizer = keras.Variable(start, dtype="float32"), keras.optimizers.SGD(OUTER_RATE)

    @hl.function
    def step(h1, h2, m1, m2):
        def after_an_update():
            updated = theta - INNER_RATE * hl.grad(quadratic)(theta.value, h1, m1)
            return quadratic(updated, h2, m2)

        return hl.minimize(after_an_update, theta, optimizer)

    for _ in range(5):
        updated = start - INNER_RATE * h1 @ (start - minima[0])
        start = start - OUTER_RATE * (np.eye(3) - INNER_RATE * h1) @ h2 @ (updated - minima[1])
        step(h1, h2, *minima)
        np.testing.assert_allclose(ops.convert_to_numpy(theta), start, rtol=1e-4, atol=1e-5)
    shown(f"off the closed form by {below(np.abs(ops.convert_to_numpy(theta) - start).max())}")


def test_d7_a_layer_learns_to_be_learned(eagerly):
    """The same with a Keras layer, whose squared error is a quadratic of its kernel (Finn et al., 2017)."""
    random = np.random.default_rng(0)
    x1, x2 = random.normal(size=(2, 20, 4)).astype("float32")
    y1, y2 = random.normal(size=(2, 20, 1)).astype("float32")
    layer = layers.Dense(1, use_bias=False)
    layer.build((None, 4))
    [kernel] = layer.get_weights()

    def error(weights, x, y):
        y_pred, _ = layer.stateless_call(weights, [], x)
        return ops.mean((y_pred - y) ** 2)

    @hl.function
    def gradient(x1, y1, x2, y2):
        def after_an_update():
            weights = [weight.value for weight in layer.trainable_variables]
            slopes = hl.grad(error)(weights, x1, y1)
            updated = [weight - INNER_RATE * slope for weight, slope in zip(weights, slopes, strict=True)]
            return error(updated, x2, y2)

        return hl.grad(after_an_update, wrt=layer)()

    h1, h2 = 2 / 20 * x1.T @ x1, 2 / 20 * x2.T @ x2
    updated = kernel - INNER_RATE * (h1 @ kernel - 2 / 20 * x1.T @ y1)
    expected = (np.eye(4) - INNER_RATE * h1) @ (h2 @ updated - 2 / 20 * x2.T @ y2)
    [found] = gradient(x1, y1, x2, y2)
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-4, atol=1e-5)
