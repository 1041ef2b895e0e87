"""TensorFlow: Python's operators between tensors of different dtypes, which TensorFlow's own refuse.

Three more differ from the other backends: a quotient of integers is of 64 bits, vectors have no product `@`, and
unsigned integers no power.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from handloom._keras import keras
from handloom.backends.operators import dtype_of, promotes, promoting

_OPERANDS = (tf.Tensor, tf.Variable, keras.Variable, np.ndarray, np.generic, bool, int, float)


def _needs_keras(name: str, tensor: Any, other: Any) -> bool:
    one, two = dtype_of(tensor), dtype_of(other)
    if one is None or two is None or not isinstance(other, _OPERANDS):
        return False
    if name == "matmul" and 1 in (_rank(tensor), _rank(other)):
        return True
    unlike = (name == "truediv" and not tensor.dtype.is_floating) or (name == "pow" and tensor.dtype.is_unsigned)
    return promotes(one, two) or unlike or (two is bool and one != "bool")


def _rank(operand: Any) -> int | None:
    return tf.TensorShape(getattr(operand, "shape", ())).rank  # type: ignore[no-any-return]


operators_of_keras = [
    *promoting(tf.Tensor, _needs_keras),
    *promoting(tf.Variable, _needs_keras),  # The value of a `keras.Variable` is one.
]
