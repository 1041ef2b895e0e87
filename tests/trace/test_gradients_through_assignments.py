"""Gradients through variables that the differentiated function assigns."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from tests.models import built
from tests.numbers import close, finite_differences

floats = st.floats(-2, 2, width=32)
# The fixtures `v` and `w` are variables at 2 and at 5.


def assigned(v, w):
    """A loss that assigns 3 w to v; it is 3 w**2."""

    def loss():
        v.assign(w * 3)
        return v * w

    return loss


# ------------------------------------------------------------------------ one variable, or two


def test_value_and_grad_read_the_assigned_value_and_do_not_reach_behind_it(v, w, eagerly):
    value, (of_v, of_w) = hl.function(hl.value_and_grad(assigned(v, w), wrt=[v, w]))()
    assert of_v is None
    close([value, of_w, v], [75, 30, 15])


def test_grad_is_none_where_a_constant_is_assigned(w, eagerly):
    def loss():
        w.assign(4.0)
        return w**2

    value, gradient = hl.function(hl.value_and_grad(loss, wrt=w))()
    assert gradient is None
    close(value, 16)


def test_grad_is_with_respect_to_the_value_before_the_assignment(w, eagerly):
    def loss():
        before = w * 2
        w.assign(w**2)
        return before + w**3

    close(hl.function(hl.grad(loss, wrt=w))(), 2 + 6 * 5.0**5)


def test_grad_through_assign_add_and_assign_sub(v, w, eagerly):
    def loss():
        v.assign_add(w**2)
        v.assign_sub(3 * w)
        return v**2

    after = 2 + 25 - 15
    close(hl.function(hl.grad(loss, wrt=[v, w]))(), [2 * after, 2 * after * (10 - 3)])


def test_grad_with_respect_to_an_argument_passes_through_a_variable(v, eagerly):
    def loss(x):
        v.assign(ops.sum(x**2))
        return v**2

    close(hl.function(hl.grad(loss))(np.array([1, 2], "float32")), [2 * 5 * 2, 2 * 5 * 4])


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.booleans(), floats), min_size=1, max_size=5), floats)
def test_grad_through_any_sequence_of_assignments_is_that_of_a_polynomial(sequence, start):
    """Two variables are assigned by turns a multiple of themselves plus the square of the other."""
    a, b = keras.Variable(start), keras.Variable(0.5)

    def loss(get, put):
        for first, factor in sequence:
            this, other = (0, 1) if first else (1, 0)
            put(this, factor * get(this) + get(other) ** 2 / 4)
        return get(0) * get(1)

    def by_variables():
        return loss(lambda i: (a, b)[i].value, lambda i, value: (a, b)[i].assign(value))

    def by_values(*values):
        kept = list(values)
        return loss(kept.__getitem__, kept.__setitem__)

    expected = hl.grad(by_values, wrt=(0, 1))(start, 0.5)
    for found, right in zip(hl.function(hl.grad(by_variables, wrt=(a, b)))(), expected, strict=True):
        close(0 if found is None else found, 0 if right is None else right, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------- the assigned values


def test_grad_assigns_once_on_each_call_and_the_rest_of_the_step_sees_it(v, w, eagerly):
    def loss():
        v.assign_add(w)
        return v * w

    @hl.function
    def step():
        gradient = hl.grad(loss, wrt=w)()
        v.assign(v + gradient)
        return gradient

    expected = 2
    for _ in range(3):
        gradient = expected + 5 + 5
        expected += 5 + gradient
        close([step(), v], [gradient, expected])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_grad_through_an_assignment_keeps_half_precision(dtype, eagerly):
    v, w = keras.Variable(2.0, dtype=dtype), keras.Variable(5.0, dtype=dtype)

    def loss():
        v.assign(w * 3)
        return ops.cast(v * w, "float32")

    gradient = hl.function(hl.grad(loss, wrt=w))()
    assert keras.backend.standardize_dtype(gradient.dtype) == dtype
    close(ops.cast(gradient, "float32"), 30)


def test_grad_stops_at_assigned_whole_numbers_and_at_stop_gradient(v, w, eagerly):
    count = keras.Variable(1, dtype="int32", trainable=False)

    def loss():
        count.assign(ops.cast(w, "int32") + count)
        v.assign(ops.stop_gradient(w * 3))
        return w * ops.cast(count, "float32") + v * w

    close(hl.function(hl.grad(loss, wrt=w))(), 6 + 15)


def test_grad_through_rows_looked_up_in_an_assigned_table(v, eagerly):
    table = keras.Variable(np.ones((4, 2)))

    def loss():
        table.assign(table * v)
        return ops.sum(ops.take(table, [1, 1, 3], axis=0)) + ops.sum(ops.take(table.value, [0], axis=0))

    of_table, of_factor = hl.function(hl.grad(loss, wrt=[table, v]))()
    close(of_table, [[2, 2], [4, 4], [0, 0], [2, 2]])
    close(of_factor, 8)


# ------------------------------------------------------------------------- branches and loops


def test_grad_through_a_branch_that_reads_an_assigned_value(v, w, eagerly):
    def loss(x):
        v.assign(w * 3)
        return ops.cond(x > 0, lambda: v * w, lambda: v * 2)

    slope = hl.function(lambda x: hl.grad(lambda: loss(x), wrt=w)())
    close([slope(np.float32(1)), slope(np.float32(-1))], [30, 6])


def test_grad_through_a_branch_that_reads_its_own_assignment(v, w, eagerly):
    def cubed():
        v.assign(w**2)
        return v * w

    slope = hl.function(lambda x: hl.grad(lambda: ops.cond(x > 0, cubed, lambda: 2 * v), wrt=w)())
    close([slope(np.float32(1)), v], [75, 25])


def test_grad_through_a_loop_that_reads_an_assigned_value(v, w, eagerly):
    def loss():
        v.assign(w * 3)
        return ops.fori_loop(0, 2, lambda _, value: value * v, 1.0 * w)  # 9 w**3

    close(hl.function(hl.grad(loss, wrt=w))(), 27 * 25)


# ------------------------------------------------------------------------------ nesting


def test_hessian_through_assignments(v, w, eagerly):
    def by_another():
        v.assign(w**2)
        return v * w

    def by_itself():
        w.assign(w**2)
        return w**2

    close(hl.function(hl.hessian(by_another, wrt=w))(), 6 * 5)
    second = hl.function(hl.hessian(by_itself, wrt=w))
    close([second(), second()], [12 * 25, 12 * 25.0**2])


def test_jacobian_through_assignments(v, eagerly):
    x = keras.Variable([1.0, 2.0])

    def outputs():
        x.assign(x**2)
        v.assign(ops.sum(x))
        return x * v

    of_x, of_v = hl.function(hl.jacobian(outputs, wrt=[x, v]))()
    close(of_x, [[2 * 5 + 2, 4], [2 * 4, 4 * 5 + 4 * 4]])
    assert of_v is None


def test_grad_of_a_gradient_through_assignments_outside_or_inside(v, w, eagerly):
    def outside():
        v.assign(w * 2)
        return hl.grad(lambda: v**3, wrt=v)() * w  # 3 (2 w)**2 w

    def inside():
        def inner():
            v.assign(w**2)
            return v * w

        return hl.grad(inner, wrt=w)() * v  # 3 w**2 w**2

    close(hl.function(hl.grad(outside, wrt=w))(), 36 * 25)
    close(hl.function(hl.grad(inside, wrt=w))(), 12 * 125)


def quadratic(theta, curvature, minimum):
    return ops.sum((theta - minimum) * ops.matmul(curvature, theta - minimum)) / 2


# The optimizers of Keras for PyTorch write into the memory of a variable, which its gradients do not see.
@pytest.mark.parametrize(
    "momentum",
    [None, *(pytest.param(factor, marks=pytest.mark.backend("jax", "tensorflow")) for factor in (0.0, 0.9))],
    ids=["by hand", "SGD", "momentum"],
)
def test_grad_through_two_updates_of_the_variable_is_the_closed_form(momentum, eagerly):
    """Each step of gradient descent on the first quadratic contributes the factor 1 - r H1."""
    random, rate = np.random.default_rng(0), 0.1
    roots, (start, m1, m2) = random.normal(size=(2, 3, 3)), random.normal(size=(3, 3))
    h1, h2, start, m1, m2 = (a.astype("float32") for a in (*(roots @ roots.swapaxes(1, 2)), start, m1, m2))
    theta, optimizer = keras.Variable(start), keras.optimizers.SGD(rate, momentum=momentum or 0.0)
    optimizer.build([theta])

    @hl.function
    def gradient(h1, h2, m1, m2):
        def after_two_updates():
            for _ in range(2):
                slope = hl.grad(lambda: quadratic(theta, h1, m1), wrt=theta)()
                if momentum is None:
                    theta.assign(theta - rate * slope)
                else:
                    optimizer.apply([slope], [theta])
            return quadratic(theta, h2, m2)

        return hl.grad(after_two_updates, wrt=theta)()

    step = np.eye(3) - rate * h1
    two_steps = step @ step - (momentum or 0.0) * rate * h1
    updated = m1 + two_steps @ (start - m1)
    close(gradient(h1, h2, m1, m2), two_steps.T @ h2 @ (updated - m2), rtol=1e-4, atol=1e-5)
    close(theta, updated, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------- layers and metrics


def test_grad_through_batch_normalization_ignores_the_moving_statistics(eagerly):
    normalize = built(layers.BatchNormalization(momentum=0.5), 2)
    x = np.array([[1.0, 2.0], [3.0, 6.0]], "float32")

    def loss(x):
        return ops.sum(normalize(x, training=True) ** 3 * x)

    @hl.function
    def gradients(x):
        return hl.grad(loss)(x), hl.grad(lambda x: loss(x) + loss(3 * x))(x), hl.grad(lambda x: loss(3 * x))(x)

    once, both, other = gradients(x)
    close(both, once + other, rtol=1e-4, atol=1e-4)
    mean, moving = x.mean(axis=0), 0
    for factor in (1, 1, 3, 3):
        moving = 0.5 * moving + 0.5 * factor * mean
    close(normalize.moving_mean, moving)


def test_grad_through_the_result_of_a_metric(eagerly):
    mean = keras.metrics.Mean()
    mean.update_state([1.0, 3.0])

    def loss(x):
        mean.update_state(x**2)
        return mean.result()

    close(hl.function(hl.grad(loss))(np.array([1, 2], "float32")), [2 / 4, 4 / 4])
    close(mean.result(), (1 + 3 + 1 + 4) / 4)


def test_grad_through_a_layer_that_assigns_its_kernel_before_it_uses_it(eagerly):
    """Divides by the largest singular value; the layer iterates for its vectors, which the gradient ignores."""
    layer = built(layers.SpectralNormalization(layers.Dense(2, use_bias=False), power_iterations=20), 2)
    kernel, x = np.array([[3.0, 1.0], [0.5, -1.0]]), np.array([[0.3, -0.7]], "float32")
    layer.layer.kernel.assign(kernel)
    expected = finite_differences(lambda kernel: np.sum((x @ (kernel / np.linalg.norm(kernel, 2))) ** 3), kernel)
    gradient = hl.grad(lambda x: ops.sum(layer(x, training=True) ** 3), wrt=layer.layer.kernel)
    close(hl.function(gradient)(x), expected, rtol=1e-3, atol=1e-4)
