"""Rows D: gradients."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops
from sklearn.datasets import load_digits

import handloom as hl
from tests.models import built
from tests.numbers import close, each_close, finite_differences, numpy
from tests.rows.figures import below


def f(w1, w2):
    return 3 * w1**2 + 2 * w1 * w2


def floats(values):
    """Gradients as floats, in lists of the same nesting; `None` where there is no gradient."""
    if isinstance(values, (list, tuple)):
        return [floats(value) for value in values]
    return None if values is None else float(values)


@pytest.fixture
def weights():
    return [keras.Variable(5.0), keras.Variable(3.0)]


def test_d1_grad_with_respect_to_variables(weights, eagerly, shown):
    gradients = floats(hl.function(hl.grad(lambda: f(*weights), wrt=weights))())
    assert gradients == [36, 10]
    shown(f"{gradients}")


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32))
def test_d1_grad_agrees_with_finite_differences(a, b):
    close(hl.grad(f, wrt=(0, 1))(a, b), finite_differences(lambda at: f(*at), [a, b]), rtol=1e-4, atol=1e-4)


def test_d2_grad_gives_several_gradients_with_respect_to_plain_tensors(eagerly, shown):
    def gradients(w1, w2):
        return hl.grad(f, wrt=0)(w1, w2), hl.grad(f, wrt=1)(w1, w2), hl.grad(f, wrt=(0, 1))(w1, w2)

    found = floats(hl.function(gradients)(np.float32(5), np.float32(3)))
    assert found == [36, 10, [36, 10]]
    shown(f"{found}")


def test_d2_grad_is_none_where_the_value_is_not_reached(weights, eagerly, shown):
    w1, bystander = weights

    def gradients(w2, constant):
        of_tensors = hl.grad(lambda w2, constant: f(w1, w2), wrt=(0, 1))(w2, constant)
        return of_tensors, hl.grad(lambda: f(w1, w2), wrt=[w1, bystander])()

    found = floats(hl.function(gradients)(np.float32(3), np.float32(1)))
    assert found == [[10, None], [36, None]]
    shown(f"not reached: {found}")


def test_d3_hessian_gives_second_derivatives(weights, eagerly, shown):
    found = floats(hl.function(hl.hessian(lambda: f(*weights), wrt=weights))())
    assert found == [[6, 2], [2, None]]
    shown(f"{found}")


def test_d4_grad_with_stop_gradient_on_the_second_term(weights, eagerly, shown):
    w1, w2 = weights
    found = floats(hl.function(hl.grad(lambda: 3 * w1**2 + ops.stop_gradient(2 * w1 * w2), wrt=(w1, w2)))())
    assert found == [30, None]
    shown(f"{found}")


def naive_softplus(z):
    return ops.log(ops.exp(z) + 1)


@ops.custom_gradient
def softplus_with_its_gradient(z):
    exp = ops.exp(z)

    def backward(*args, upstream=None):
        # PyTorch passes the inputs, and `upstream` by name; the others pass `upstream` alone.
        return (args[0] if upstream is None else upstream) * (1 - 1 / (1 + exp))

    return ops.log(exp + 1), backward


def stable_softplus(z):
    return ops.where(z > 30, z, ops.log(ops.exp(ops.minimum(z, 30.0)) + 1))


def test_d5_grad_of_a_naive_softplus_overflows_and_a_custom_gradient_or_a_stable_form_does_not(eagerly, shown):
    hundred = np.float32(100)
    naive = float(hl.function(hl.grad(naive_softplus))(hundred))
    assert np.isnan(naive)
    shown(f"naive: {naive}")
    custom = hl.function(hl.grad(softplus_with_its_gradient))
    close([custom(np.float32(z)) for z in (1, -2)], [1 / (1 + np.exp(-z)) for z in (1, -2)])
    assert float(custom(hundred)) == 1
    shown(f"custom gradient: {float(custom(hundred))}")
    stable = floats(hl.function(hl.value_and_grad(stable_softplus))(hundred))
    assert stable == [100, 1]
    shown(f"stable: {stable[0]}, slope {stable[1]}")


def critic_of(sizes):
    # The slopes start far from 1.
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
    """The penalty on slopes of a critic other than 1, at the given points (Gulrajani et al., 2017)."""
    slopes = hl.grad(lambda x: ops.sum(through(critic, x)))(at)
    return ops.mean((ops.sqrt(ops.sum(slopes**2, axis=-1)) - 1) ** 2)


def loss_with_penalty(critic, first, real, drawn):
    """The loss of a Wasserstein critic with a penalty on the slope with respect to the inputs of layer `first`."""
    far = penalty_of(critic[first:], through(critic[:first], (real + drawn) / 2))
    return ops.mean(through(critic, drawn)) - ops.mean(through(critic, real)) + 10 * far, far


def digits_and_noise(count):
    real = (load_digits().data[:count] / 8 - 1).astype("float32")
    return real, np.random.default_rng(0).uniform(-1, 1, real.shape).astype("float32")


@pytest.mark.parametrize("first", [0, 1], ids=["inputs", "activations"])
def test_d6_minimize_trains_with_a_penalty_on_a_gradient(first, shown):
    critic, optimizer = critic_of([16, 16]), keras.optimizers.Adam(1e-2)

    @hl.function
    def train_step(real, drawn):
        return hl.minimize(lambda: loss_with_penalty(critic, first, real, drawn), critic, optimizer, has_aux=True)

    data = digits_and_noise(32)
    history = np.array([floats(train_step(*data)) for _ in range(100)])
    losses, penalties = history.T
    assert losses[-1] < losses[0]
    assert penalties[-1] < penalties[0] / 10
    shown(f"penalty from {penalties[0]:.2f} to below a tenth")


def gradients_by_hand(weights, real, drawn):
    """By PyTorch alone, on every backend, in double precision."""
    torch = pytest.importorskip("torch")
    weights = [torch.tensor(weight, dtype=torch.float64, requires_grad=True) for weight in weights]
    real, drawn = (torch.tensor(x, dtype=torch.float64) for x in (real, drawn))

    def judged(x):
        *hidden, (kernel, bias) = zip(weights[::2], weights[1::2], strict=True)
        for inner_kernel, inner_bias in hidden:
            x = torch.tanh(x @ inner_kernel + inner_bias)
        return x @ kernel + bias

    between = ((real + drawn) / 2).requires_grad_()
    [slopes] = torch.autograd.grad(judged(between).sum(), between, create_graph=True)
    far = ((slopes.norm(dim=-1) - 1) ** 2).mean()
    loss = judged(drawn).mean() - judged(real).mean() + 10 * far
    return [gradient.numpy() for gradient in torch.autograd.grad(loss, weights)]


def test_d6_grad_through_a_penalty_on_a_gradient_is_that_of_pytorch_by_hand(eagerly, shown):
    critic, data = critic_of([16, 16]), digits_and_noise(32)
    gradients = hl.function(hl.grad(lambda *data: loss_with_penalty(critic, 0, *data)[0], wrt=critic))(*data)
    expected = gradients_by_hand([weight for layer in critic for weight in layer.get_weights()], *data)
    each_close(keras.tree.flatten(gradients), expected, rtol=1e-4, atol=1e-3)  # The largest are about 400.
    shown("gradients as by hand in PyTorch")


INNER_RATE, OUTER_RATE = 0.1, 0.05


def quadratic(theta, curvature, minimum):
    return ops.sum((theta - minimum) * ops.matmul(curvature, theta - minimum)) / 2


def test_d7_minimize_through_an_update_follows_the_closed_form(eagerly, shown):
    """The gradient of q2(t - r q1'(t)), with qi(t) = (t - mi) Hi (t - mi) / 2, is (1 - r H1) H2 (t' - m2)."""
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
        close(theta, start, rtol=1e-4, atol=1e-5)
    shown(f"differs from the closed form by {below(np.abs(numpy(theta) - start).max())}")


def test_d7_grad_through_an_update_of_a_layer_is_the_closed_form(eagerly):
    """The squared error of a Dense layer is a quadratic in its kernel (Finn et al., 2017)."""
    random = np.random.default_rng(0)
    x1, x2 = random.normal(size=(2, 20, 4)).astype("float32")
    y1, y2 = random.normal(size=(2, 20, 1)).astype("float32")
    layer = built(layers.Dense(1, use_bias=False), 4)
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
    close(found, expected, rtol=1e-4, atol=1e-5)
