"""TensorFlow: gradients of operations that Keras uses and TensorFlow cannot differentiate, and of terms of a loss.

Internals used: `dynamic_update_slice`, XLA's operation behind `ops.slice_update`.
"""

import contextlib
from collections.abc import Callable

import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import dynamic_update_slice

from handloom._keras import Tensor


def term_twice(term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """See `Backend.term_twice`. Both tensors are computed from a third, so its gradient is taken after theirs."""
    received: dict[str, Tensor] = {}

    def noted(name: str) -> Callable[[Tensor], Tensor]:
        def gradient_noted(gradient: Tensor) -> Tensor:
            received[name] = gradient
            return gradient

        identity: Callable[[Tensor], Tensor] = tf.custom_gradient(lambda value: (tf.identity(value), gradient_noted))
        return identity

    def gradient_of_one(_: Tensor) -> Tensor | None:
        of_first, of_second = (received.pop(name, None) for name in ("first", "second"))
        if of_first is None:
            return of_second
        included()
        return of_first

    third = tf.custom_gradient(lambda value: (tf.identity(value), gradient_of_one))(term)
    return noted("first")(third), noted("second")(third)


def _slice_update(operation: tf.Operation, gradient: Tensor) -> list[Tensor | None]:
    inputs, updates, indices = operation.inputs
    shape = tf.shape(updates, out_type=indices.dtype)
    # XLA shifts a slice that would reach beyond the end back into the tensor.
    start = tf.clip_by_value(indices, 0, tf.shape(inputs, out_type=indices.dtype) - shape)
    return [dynamic_update_slice(gradient, tf.zeros_like(updates), start), tf.slice(gradient, start, shape), None]


def _bincount(operation: tf.Operation, gradient: Tensor) -> list[Tensor | None]:
    numbers, size, _ = operation.inputs
    if operation.get_attr("binary_output"):
        return [None, None, None]
    counted = tf.cast(numbers < size, gradient.dtype)
    bins = tf.minimum(numbers, size - 1)
    return [None, None, counted * tf.gather(gradient, bins, batch_dims=len(numbers.shape) - 1)]


def _view(operation: tf.Operation, gradient: Tensor) -> Tensor | None:
    same = operation.get_attr("T") == operation.get_attr("type")
    return gradient if same else None  # The reinterpreted bits of a number are not a differentiable function of it.


for _name, _gradient in {"XlaDynamicUpdateSlice": _slice_update, "DenseBincount": _bincount, "Bitcast": _view}.items():
    with contextlib.suppress(KeyError):  # The operation has a gradient, which may be TensorFlow's own: it stays.
        tf.RegisterGradient(_name)(_gradient)
