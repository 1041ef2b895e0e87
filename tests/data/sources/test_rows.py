"""Data whose rows are examples, and which is no array: sparse matrices of SciPy, ragged tensors on TensorFlow."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.models import compiled, fit
from tests.numbers import close, normal

sparse, tf = (pytest.importorskip(name) for name in ("scipy.sparse", "tensorflow"))

DENSE = normal(10, 4) * (normal(10, 4, seed=1) > 0)
Y = normal(10, 1, seed=2)
FORMATS = ["csr_matrix", "coo_matrix", "csc_array", "lil_matrix"]


def trained(x, cls=hl.Sequential, **options):
    """What a model reports that is trained on these inputs, and its outputs for them."""
    keras.utils.set_random_seed(0)
    model = compiled(cls([layers.Dense(1, kernel_initializer="ones")]))
    logs = fit(model, x, Y, batch_size=4, epochs=2, **options)
    return logs, model.predict(x, batch_size=4, verbose=0), model.evaluate(x, Y, verbose=0)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"validation_split": 0.2}], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_fit_evaluate_and_predict_take_sparse_matrices_of_scipy_like_arrays(form, options):
    expected = trained(DENSE, **options)
    logs, outputs, loss = trained(getattr(sparse, form)(DENSE.astype("float64")), **options)
    assert logs == {name: pytest.approx(values, rel=1e-4) for name, values in expected[0].items()}
    close(outputs, expected[1], rtol=1e-4)
    assert loss == pytest.approx(expected[2], rel=1e-4)


def test_fit_with_sparse_matrices_agrees_with_keras():
    x = sparse.csr_matrix(DENSE)
    assert trained(x)[0] == {"loss": pytest.approx(trained(x, keras.Sequential)[0]["loss"], rel=1e-4)}


def test_fit_takes_a_generator_of_sparse_matrices_and_predict_on_batch_takes_one():
    x = sparse.coo_matrix(DENSE)
    logs = hl.fit(lambda x: {"sum": ops.sum(ops.matmul(x, ops.ones((4, 1))))}, lambda: iter([x]), verbose=0).history
    assert logs == {"sum": [pytest.approx(DENSE.sum(), rel=1e-4)]}
    model = compiled(hl.Sequential([layers.Dense(1, kernel_initializer="ones")]))
    close(model.predict_on_batch(x), DENSE.sum(1, keepdims=True), rtol=1e-4)


def test_feed_knows_a_sparse_matrix_again():
    state = hl.Feed(sparse.csr_matrix(DENSE)).state()
    assert hl.Feed(sparse.csr_matrix(DENSE)).differences(state) == []
    assert hl.Feed(sparse.csr_matrix(2 * DENSE)).differences(state) == ["the values of the data have changed"]


ROWS = [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], [], [7.0], [8.0, 9.0]]


class Scaled(hl.Model):
    """Multiplies ragged rows by a weight; the loss is that of their sums."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(initializer="ones")

    def call(self, x):
        return x * self.scale

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean((tf.reduce_sum(y_pred, 1) - y) ** 2)


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_and_predict_take_a_ragged_tensor_and_predict_joins_ragged_outputs(shuffle, eagerly):
    sums, x = np.float32([sum(row) for row in ROWS]), tf.ragged.constant(ROWS)
    model = compiled(Scaled(), keras.optimizers.SGD(1e-3), loss=None)
    [loss] = fit(model, x, 2 * sums, batch_size=6, shuffle=shuffle)["loss"]
    scale = 1 + 1e-3 * 2 * np.mean(sums**2)
    assert loss == pytest.approx(np.mean(sums**2))
    close(model.scale, scale)
    outputs = model.predict(x, batch_size=4, verbose=0)
    assert isinstance(outputs, tf.RaggedTensor)
    for row, expected in zip(outputs.to_list(), ROWS, strict=True):
        close(np.float32(row), scale * np.float32(expected))


@pytest.mark.backend("tensorflow")
def test_predict_joins_outputs_of_different_widths_as_keras_does():
    def widths(cls):
        inputs = keras.Input((1,))
        outputs = layers.Lambda(lambda x: tf.tile(x, [1, tf.shape(x)[0]]), (None,))(inputs)
        return cls(inputs, outputs).predict(np.float32([[1], [2], [3]]), batch_size=2, verbose=0).to_list()

    assert widths(hl.Model) == widths(keras.Model) == [[1, 1], [2, 2], [3]]
