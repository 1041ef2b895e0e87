"""TensorFlow: gradients of operations that it cannot differentiate itself, against closed forms."""

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import handloom as hl
from handloom.errors import GradientError
from tests.numbers import ones, same

x = np.arange(12, dtype="float32").reshape(3, 4)


def squares(inputs, updates, start=(2, 3)):
    return ops.sum(ops.slice_update(inputs, start, updates) ** 2)


def test_grad_of_slice_update_beyond_the_end_is_where_xla_moves_the_slice():
    of_inputs, of_updates = hl.grad(squares, wrt=(0, 1))(x, 3 * ones(2, 2))
    outside = x.copy()
    outside[1:, 2:] = 0  # Of three rows and four columns, the last place for two of each.
    same(of_inputs, 2 * outside)
    same(of_updates, 6 * ones(2, 2))


def test_grad_of_slice_update_nests():
    def slope(updates):
        return ops.sum(hl.grad(squares, wrt=1)(x, updates) ** 2)  # 4 u²

    same(hl.grad(slope)(3 * ones(2, 2)), 24 * ones(2, 2))


def test_jacobian_of_slice_update():
    rows = hl.jacobian(lambda updates: ops.slice_update(x[:2, :2], (0, 0), updates))(ones(2, 2))
    same(np.reshape(rows, (4, 4)), np.eye(4))


def test_grad_of_bincount_ignores_numbers_without_a_bin():
    def counts(weights):
        return tf.reduce_sum(tf.constant([1.0, 10.0]) * tf.math.bincount([0, 5, 1], weights, maxlength=2, minlength=2))

    same(hl.grad(counts)(ones(3)), [1.0, 0.0, 10.0])


def test_grad_of_binary_bincount_is_zero():
    def there(weights):
        return tf.reduce_sum(
            tf.raw_ops.DenseBincount(input=[0, 1, 1], size=2, weights=weights, binary_output=True) * weights[:2]
        )

    same(hl.grad(there)(ones(3)), [1.0, 1.0, 0.0])


def test_grad_of_view_passes_through_the_same_dtype_only():
    same(hl.grad(lambda x: ops.sum(ops.view(x, "float32") ** 2))(x), 2 * x)
    assert hl.grad(lambda x: ops.sum(ops.cast(ops.view(x, "int32"), "float32")))(x) is None


def test_grad_names_an_operation_without_a_derivative():
    with pytest.raises(GradientError, match=r"TensorFlow has no derivative of the operation Lu\..*stop_gradient"):
        hl.function(hl.grad(lambda x: ops.sum(tf.linalg.lu(x)[0])))(x[:, :3])
