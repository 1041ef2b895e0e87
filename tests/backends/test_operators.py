"""Python's operators inside a step promote dtypes as `keras.ops` do, and are the framework's own everywhere else."""

import itertools
import operator

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from tests.models import compiled, fit
from tests.numbers import close, normal, numpy, ones, same
from tests.threads import in_a_thread

OPERATORS = {
    operator.add: ops.add,
    operator.sub: ops.subtract,
    operator.mul: ops.multiply,
    operator.truediv: ops.true_divide,
    operator.floordiv: ops.floor_divide,
    operator.mod: ops.mod,
    operator.pow: ops.power,
    operator.matmul: ops.matmul,
    operator.lt: ops.less,
    operator.le: ops.less_equal,
    operator.gt: ops.greater,
    operator.ge: ops.greater_equal,
    operator.eq: ops.equal,
    operator.ne: ops.not_equal,
}
DTYPES = ["bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32"]
NUMBERS = [2, 2.5]
ARRAYS = [np.float32([2, 1]), np.array([2, 1])]


# The product of matrices; and Keras on TensorFlow widens the tensor in the remainder by a number.
WITHOUT_NUMBERS = (operator.matmul, operator.mod)


def operands(op):
    """Pairs of tensors of different dtypes; and of a tensor and an array or a number."""
    tensors = [ops.cast(np.array([1, 3]), dtype) for dtype in DTYPES]
    yield from itertools.permutations(tensors, 2)
    for tensor, other in itertools.product(tensors, ARRAYS + NUMBERS * (op not in WITHOUT_NUMBERS)):
        yield from ((tensor, other), (other, tensor))


def outcome(op, *pair):
    """The dtype and values of a result, `None` where Keras refuses."""
    try:
        result = op(*pair)
    except Exception:
        return None
    return keras.backend.standardize_dtype(result.dtype), numpy(ops.cast(result, "float32"))


# Of booleans and Python integers, or 64-bit integers under //, Keras on PyTorch returns int32, PyTorch int64.
WIDE = {"int32", "int64", "uint8", "int8"} if backend.name == "torch" else set()


@pytest.mark.backend("tensorflow", "torch")  # JAX's operators are what Keras calls.
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
def test_function_promotes_the_operands_of_an_operator_as_keras_ops_do(op, eagerly):
    pairs = [pair for pair in operands(op) if outcome(OPERATORS[op], *pair) is not None]
    assert len(pairs) > 30
    results = hl.function(lambda: [op(*pair) for pair in pairs])()
    for pair, result in zip(pairs, results, strict=True):
        dtype, values = outcome(lambda value: value, result)
        expected, numbers = outcome(OPERATORS[op], *pair)
        assert dtype == expected or {dtype, expected} <= WIDE, pair
        close(values, numbers, rtol=1e-2)


class Differences(hl.Model):
    """Computes with labels of whole numbers and with its variables, on either side."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1, kernel_initializer="ones")
        self.count = keras.Variable(np.int32(3), trainable=False)

    def train_step(self, data):
        x, y = data
        loss = self.minimize(lambda: ops.mean((self.dense(x) - y) ** 2))
        found = {"loss": loss, "reflected": ops.mean(y - self.dense(x)), "count": self.count * 0.5 - y[0, 0] / 2}
        found["missed"] = ops.mean(1 - (self.dense(x) > y))
        return found | {"hits": ops.sum(y > 0) / len(y), "product": ops.sum(x @ ops.ones((2, 1), "int32"))}


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_fit_with_operators_between_outputs_and_labels_of_whole_numbers(dtype, eagerly):
    keras.config.set_dtype_policy(dtype)
    x, y = np.float32([[1, 2], [3, -1], [0, 1], [2, 2]]), np.array([[1], [0], [2], [5]])
    logs = fit(compiled(Differences(), keras.optimizers.SGD(0.0), loss=None), x, y, batch_size=4)
    outputs = x.sum(1, keepdims=True)
    expected = {
        "loss": np.mean((outputs - y) ** 2),
        "reflected": np.mean(y - outputs),
        "count": 3 * 0.5 - 1 / 2,
        "missed": np.mean(outputs <= y),
        "hits": 3 / 4,
        "product": x.sum(),
    }
    assert logs == {name: [pytest.approx(value, rel=1e-3)] for name, value in expected.items()}


@pytest.mark.parametrize("target", [np.array([1, 2]), np.array([1.0, 2.0])], ids=["int64", "float64"])
@pytest.mark.parametrize("difference", [operator.sub, lambda a, b: b - a])
def test_minimize_outside_of_a_function_with_a_target_in_numpy(difference, target):
    w = keras.Variable(ones(2))
    loss = hl.minimize(lambda: ops.sum(difference(w * 1, target) ** 2), [w], keras.optimizers.SGD(0.25))
    close(loss, 1)
    close(w, [1, 1.5])


@pytest.mark.backend("tensorflow", "torch")
def test_operators_are_those_of_the_framework_outside_of_steps_and_in_other_threads():
    x, y = ops.ones((2, 2)), ops.ones((2, 2), "int32")
    own = [getattr(cls, "__matmul__", None) for cls in type(x).__mro__]

    def refused():
        with pytest.raises(Exception, match=r"dtype|float|int32|Int"):
            x @ y

    @hl.function
    def step(x, y):
        in_a_thread(refused)
        return x @ y

    refused()
    with hl.run_eagerly(True):
        same(step(x, y), 2 * ones(2, 2))
    same(step(x, y), 2 * ones(2, 2))
    refused()
    assert own == [getattr(cls, "__matmul__", None) for cls in type(x).__mro__]


@pytest.mark.backend("tensorflow")
def test_export_of_a_model_whose_layers_compute_with_whole_numbers(tmp_path):
    inputs = keras.Input((3,))
    model = hl.Model(inputs, layers.Lambda(lambda x: x * ops.arange(3), output_shape=(3,))(inputs))
    model.export(tmp_path / "model", verbose=False)
    x = normal(2, 3)
    same(__import__("tensorflow").saved_model.load(str(tmp_path / "model")).serve(x), x * np.arange(3))
