"""Gradients through variables that the differentiated function assigns."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
numbers = st.floats(-2, 2, width=32)


# ------------------------------------------------------------------------ one variable, or two


def test_what_is_read_after_an_assignment_is_what_was_assigned(v, w, eagerly):
    def loss():
        v.assign(w * 3)
        return v * w

    value, gradient = hl.function(hl.value_and_grad(loss, wrt=w))()
    close([value, gradient, ops.convert_to_numpy(v)], [75, 30, 15])


def test_no_gradient_reaches_back_over_an_assignment(v, w, eagerly):
    def loss():
        v.assign(w * 3)
        return v * w

    of_v, of_w = hl.function(hl.grad(loss, wrt=[v, w]))()
    assert of_v is None
    close(of_w, 30)


def test_what_is_assigned_and_depends_on_nothing_has_no_gradient(w, eagerly):
    def loss():
        w.assign(4.0)
        return w**2

    value, gradient = hl.function(hl.value_and_grad(loss, wrt=w))()
    assert gradient is None
    close(value, 16)


def test_a_gradient_is_that_with_respect_to_the_value_before_the_assignment(w, eagerly):
    def loss():
        before = w * 2
        w.assign(w**2)
        return before + w**3

    close(hl.function(hl.grad(loss, wrt=w))(), 2 + 6 * 5.0**5)


def test_each_read_is_of_the_assignment_before_it(v, w, eagerly):
    def loss():
        first = v * w
        v.assign(w * v)
        second = v * w
        v.assign(v * v)
        return first + second + v  # v w + v w**2 + v**2 w**2

    close(hl.function(hl.grad(loss, wrt=[v, w]))(), [5 + 25 + 100, 2 + 20 + 40])


def test_gradients_flow_from_variable_to_variable(v, w, eagerly):
    last = keras.Variable(0.0, trainable=False)

    def loss():
        v.assign(w**2)
        last.assign(v**2)
        v.assign(v + last)
        return v + last  # w**2 + 2 w**4

    close(hl.function(hl.grad(loss, wrt=w))(), 10 + 8 * 125)


def test_what_is_added_and_subtracted_counts(v, w, eagerly):
    def loss():
        v.assign_add(w**2)
        v.assign_sub(3 * w)
        return v**2

    after = 2 + 25 - 15
    close(hl.function(hl.grad(loss, wrt=[v, w]))(), [2 * after, 2 * after * (10 - 3)])


def test_a_position_reaches_the_value_through_a_variable(v, eagerly):
    def loss(x):
        v.assign(ops.sum(x**2))
        return v**2

    close(hl.function(hl.grad(loss))(np.array([1, 2], "float32")), [2 * 5 * 2, 2 * 5 * 4])


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.booleans(), numbers), min_size=1, max_size=5), numbers)
def test_any_sequence_of_assignments_is_a_polynomial(sequence, start):
    """Two variables take turns at being a multiple of themselves plus the square of the other."""
    a, b = keras.Variable(start), keras.Variable(0.5)

    def loss(get, put):
        for first, factor in sequence:
            own, other = (0, 1) if first else (1, 0)
            put(own, factor * get(own) + get(other) ** 2 / 4)
        return get(0) * get(1)

    def by_variables():
        return loss(lambda i: (a, b)[i].value, lambda i, value: (a, b)[i].assign(value))

    def by_values(*values):
        kept = list(values)
        return loss(kept.__getitem__, kept.__setitem__)

    expected = hl.grad(by_values, wrt=(0, 1))(start, 0.5)
    for found, right in zip(hl.function(hl.grad(by_variables, wrt=(a, b)))(), expected, strict=True):
        close(0 if found is None else found, 0 if right is None else right, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------- what is assigned


def test_everything_is_assigned_once_each_time(v, w, eagerly):
    def loss():
        v.assign_add(w)
        return v * w

    step = hl.function(hl.grad(loss, wrt=w))
    for times in (1, 2, 3):
        close(step(), 2 + 5 * times + 5)
        close(ops.convert_to_numpy(v), 2 + 5 * times)


def test_what_follows_a_differentiated_function_sees_what_it_assigned(v, w, eagerly):
    def loss():
        v.assign(w * 3)
        return v * w

    @hl.function
    def step():
        gradient = hl.grad(loss, wrt=w)()
        v.assign(v + gradient)
        w.assign(v + 1)
        return v * w

    close(step(), 45 * 46)
    close(ops.convert_to_numpy(v), 45)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept(dtype, eagerly):
    v, w = keras.Variable(2.0, dtype=dtype), keras.Variable(5.0, dtype=dtype)

    def loss():
        v.assign(w * 3)
        return ops.cast(v * w, "float32")

    gradient = hl.function(hl.grad(loss, wrt=w))()
    assert keras.backend.standardize_dtype(gradient.dtype) == dtype
    close(ops.convert_to_numpy(ops.cast(gradient, "float32")), 30)


def test_whole_numbers_stop_it(w, eagerly):
    count = keras.Variable(1, dtype="int32", trainable=False)

    def loss():
        count.assign(ops.cast(w, "int32") + count)
        return w * ops.cast(count, "float32")

    close(hl.function(hl.grad(loss, wrt=w))(), 6)


def test_nothing_flows_where_it_is_stopped(v, w, eagerly):
    def loss():
        v.assign(ops.stop_gradient(w * 3))
        return v * w

    close(hl.function(hl.grad(loss, wrt=w))(), 15)


def test_rows_that_are_looked_up_reach_what_was_assigned(v, eagerly):
    table = keras.Variable(np.ones((4, 2)))

    def loss():
        table.assign(table * v)
        return ops.sum(ops.take(table, [1, 1, 3], axis=0)) + ops.sum(ops.take(table.value, [0], axis=0))

    of_table, of_factor = hl.function(hl.grad(loss, wrt=[table, v]))()
    close(of_table, [[2, 2], [4, 4], [0, 0], [2, 2]])
    close(of_factor, 8)


# ------------------------------------------------------------------------- branches and loops


def test_a_branch_reads_what_was_assigned_before_it(v, w, eagerly):
    def loss(x):
        v.assign(w * 3)
        return ops.cond(x > 0, lambda: v * w, lambda: v * 2)

    slope = hl.function(lambda x: hl.grad(lambda: loss(x), wrt=w)())
    close([slope(np.float32(1)), slope(np.float32(-1))], [30, 6])


def test_a_branch_reads_what_it_assigned(v, w, eagerly):
    def cubed():
        v.assign(w**2)
        return v * w

    slope = hl.function(lambda x: hl.grad(lambda: ops.cond(x > 0, cubed, lambda: 2 * v), wrt=w)())
    close(slope(np.float32(1)), 75)
    close(ops.convert_to_numpy(v), 25)


def test_a_loop_reads_what_was_assigned_before_it(v, w, eagerly):
    def loss():
        v.assign(w * 3)
        return ops.fori_loop(0, 2, lambda _, value: value * v, 1.0 * w)  # 9 w**3

    close(hl.function(hl.grad(loss, wrt=w))(), 27 * 25)


# ------------------------------------------------------------------------------ nested at will


def test_second_derivatives(v, w, eagerly):
    def loss():
        v.assign(w**2)
        return v * w

    close(hl.function(hl.hessian(loss, wrt=w))(), 6 * 5)
    close(ops.convert_to_numpy(w), 5)


def test_second_derivatives_of_what_is_assigned_itself(w, eagerly):
    def loss():
        w.assign(w**2)
        return w**2

    second = hl.function(hl.hessian(loss, wrt=w))
    close(second(), 12 * 25)
    close(second(), 12 * 25.0**2)


def test_a_jacobian(v, eagerly):
    x = keras.Variable([1.0, 2.0])

    def outputs():
        x.assign(x**2)
        v.assign(ops.sum(x))
        return x * v

    of_x, of_v = hl.function(hl.jacobian(outputs, wrt=[x, v]))()
    close(of_x, [[2 * 5 + 2, 4], [2 * 4, 4 * 5 + 4 * 4]])
    assert of_v is None


def test_a_gradient_inside_is_with_respect_to_what_was_assigned(v, w, eagerly):
    def loss():
        v.assign(w * 2)
        return hl.grad(lambda: v**3, wrt=v)() * w  # 3 (2 w)**2 w

    close(hl.function(hl.grad(loss, wrt=w))(), 36 * 25)


def test_a_gradient_inside_a_gradient_may_assign(v, w, eagerly):
    def inner():
        v.assign(w**2)
        return v * w

    def loss():
        return hl.grad(inner, wrt=w)() * v  # 3 w**2 w**2

    close(hl.function(hl.grad(loss, wrt=w))(), 12 * 125)


def quadratic(theta, curvature, minimum):
    return ops.sum((theta - minimum) * ops.matmul(curvature, theta - minimum)) / 2


def two_quadratics():
    random = np.random.default_rng(0)
    roots, (start, m1, m2) = random.normal(size=(2, 3, 3)), random.normal(size=(3, 3))
    return [array.astype("float32") for array in (*(roots @ roots.swapaxes(1, 2)), start, m1, m2)]


def test_the_gradient_through_updates_of_the_variable_itself_is_the_closed_form(eagerly):
    """Each step of gradient descent on the first quadratic brings the factor 1 - r H1."""
    h1, h2, start, m1, m2 = two_quadratics()
    theta, rate = keras.Variable(start), 0.1

    @hl.function
    def gradient(h1, h2, m1, m2):
        def after_two_updates():
            for _ in range(2):
                theta.assign(theta - rate * hl.grad(lambda: quadratic(theta, h1, m1), wrt=theta)())
            return quadratic(theta, h2, m2)

        return hl.grad(after_two_updates, wrt=theta)()

    step = np.eye(3) - rate * h1
    updated = m1 + step @ step @ (start - m1)
    close(gradient(h1, h2, m1, m2), step @ step @ h2 @ (updated - m2), rtol=1e-4, atol=1e-5)
    close(ops.convert_to_numpy(theta), updated, rtol=1e-4, atol=1e-5)


# Keras's optimizers for PyTorch write into the memory of a variable, out of sight of its gradients.
@pytest.mark.backend("jax", "tensorflow")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_gradient_through_updates_by_an_optimizer_is_the_closed_form(momentum, eagerly):
    h1, h2, start, m1, m2 = two_quadratics()
    theta, rate = keras.Variable(start), 0.1
    optimizer = keras.optimizers.SGD(rate, momentum=momentum)
    optimizer.build([theta])

    @hl.function
    def gradient(h1, h2, m1, m2):
        def after_two_updates():
            for _ in range(2):
                optimizer.apply([hl.grad(lambda: quadratic(theta, h1, m1), wrt=theta)()], [theta])
            return quadratic(theta, h2, m2)

        return hl.grad(after_two_updates, wrt=theta)()

    step = np.eye(3) - rate * h1
    two_steps = step @ step - momentum * rate * h1
    updated = m1 + two_steps @ (start - m1)
    close(gradient(h1, h2, m1, m2), two_steps.T @ h2 @ (updated - m2), rtol=1e-4, atol=1e-5)
    close(ops.convert_to_numpy(theta), updated, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------- what Keras assigns


def test_batch_statistics_gather_and_weigh_nothing(eagerly):
    normalize = layers.BatchNormalization(momentum=0.5)
    normalize.build((None, 2))
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
    close(ops.convert_to_numpy(normalize.moving_mean), moving)


def test_what_a_metric_gathered_may_be_the_loss(eagerly):
    mean = keras.metrics.Mean()
    mean.update_state([1.0, 3.0])

    def loss(x):
        mean.update_state(x**2)
        return mean.result()

    close(hl.function(hl.grad(loss))(np.array([1, 2], "float32")), [2 / 4, 4 / 4])
    close(ops.convert_to_numpy(mean.result()), (1 + 3 + 1 + 4) / 4)


def test_a_layer_that_assigns_its_kernel_before_it_uses_it(eagerly):
    """By its largest singular value, of which the layer finds the vectors by iteration and then the gradient."""
    layer = layers.SpectralNormalization(layers.Dense(2, use_bias=False), power_iterations=20)
    layer.build((None, 2))
    kernel, x = np.array([[3.0, 1.0], [0.5, -1.0]]), np.array([[0.3, -0.7]], "float32")
    layer.layer.kernel.assign(kernel)

    def in_numpy(kernel):
        return np.sum((x @ (kernel / np.linalg.norm(kernel, 2))) ** 3)

    units = np.eye(4).reshape(4, 2, 2) * 1e-5
    expected = [(in_numpy(kernel + unit) - in_numpy(kernel - unit)) / 2e-5 for unit in units]
    gradient = hl.grad(lambda x: ops.sum(layer(x, training=True) ** 3), wrt=layer.layer.kernel)
    close(hl.function(gradient)(x), np.reshape(expected, (2, 2)), rtol=1e-3, atol=1e-4)
