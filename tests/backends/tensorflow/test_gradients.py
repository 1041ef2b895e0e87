"""TensorFlow: gradients of operations that it has none for, against closed forms."""

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import handloom as hl
from handloom.errors import GradientError

x = np.arange(12, dtype="float32").reshape(3, 4)
ones = np.ones((2, 2), "float32")


def squares(inputs, updates, start=(2, 3)):
    return ops.sum(ops.slice_update(inputs, start, updates) ** 2)


def test_a_slice_beyond_the_end_counts_where_xla_moves_it():
    of_inputs, of_updates = hl.grad(squares, wrt=(0, 1))(x, 3 * ones)
    outside = x.copy()
    outside[1:, 2:] = 0  # Of three rows and four columns, the last place for two of each.
    np.testing.assert_array_equal(of_inputs, 2 * outside)
    np.testing.assert_array_equal(of_updates, 6 * ones)


def test_an_updated_slice_can_be_derived_twice():
    def slope(updates):
        return ops.sum(hl.grad(squares, wrt=1)(x, updates) ** 2)  # 4 u²

    np.testing.assert_array_equal(hl.grad(slope)(3 * ones), 24 * ones)


def test_the_jacobian_of_an_updated_slice():
    rows = hl.jacobian(lambda updates: ops.slice_update(x[:2, :2], (0, 0), updates))(ones)
    np.testing.assert_array_equal(np.reshape(rows, (4, 4)), np.eye(4))


def test_a_number_without_a_bin_counts_for_nothing():
    def counts(weights):
        return tf.reduce_sum(tf.constant([1.0, 10.0]) * tf.math.bincount([0, 5, 1], weights, maxlength=2, minlength=2))

    np.testing.assert_array_equal(hl.grad(counts)(np.ones(3, "float32")), [1.0, 0.0, 10.0])


def test_whether_a_number_is_there_depends_on_no_weight():
    def there(weights):
        return tf.reduce_sum(
            tf.raw_ops.DenseBincount(input=[0, 1, 1], size=2, weights=weights, binary_output=True) * weights[:2]
        )

    np.testing.assert_array_equal(hl.grad(there)(np.ones(3, "float32")), [1.0, 1.0, 0.0])


def test_bits_taken_for_the_type_they_are_of_pass_gradients_on():
    np.testing.assert_array_equal(hl.grad(lambda x: ops.sum(ops.view(x, "float32") ** 2))(x), 2 * x)
    assert hl.grad(lambda x: ops.sum(ops.cast(ops.view(x, "int32"), "float32")))(x) is None


def test_an_operation_without_a_derivative_is_named():
    with pytest.raises(GradientError, match=r"TensorFlow has no derivative of the operation Lu\..*stop_gradient"):
        hl.function(hl.grad(lambda x: ops.sum(tf.linalg.lu(x)[0])))(x[:, :3])
