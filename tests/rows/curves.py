"""The runs that must give the same curves on three backends from the same start; no line of them names a backend."""

import functools
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning
from tests.models import fit, subclassed
from tests.numbers import close
from tests.on_backends import arrays_by_backend
from tests.rows.real_data import diabetes


def start(*shapes):
    """Weights to start from, drawn by NumPy."""
    random = np.random.default_rng(1)
    return [random.normal(scale=0.3, size=shape).astype("float32") for shape in shapes]


def a1():
    """A whole-batch loop by hand: MSE, Adam(0.01), 100 epochs. Returns the loss before each update."""
    x, y = diabetes()
    model = subclassed(layers.Dense(16, "tanh"), layers.Dense(1), inputs=10, cls=keras.Model)
    model.set_weights(start((10, 16), 16, (16, 1), 1))
    optimizer = keras.optimizers.Adam(0.01)

    @hl.function
    def train_step(x, y):
        return hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)

    return {"loss": [float(train_step(x, y)) for _ in range(100)]}


class ReconstructingRegressor(hl.Model):
    """Also reconstructs its inputs from its hidden layer; the error of the reconstruction is a loss and a metric."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(8, activation="tanh")
        self.out = layers.Dense(1)
        self.reconstruct = layers.Dense(10)
        self.reconstruction_error = keras.metrics.Mean(name="reconstruction_error")

    def call(self, x, training=False):
        hidden = self.hidden(x)
        error = ops.mean((self.reconstruct(hidden) - x) ** 2)
        self.add_loss(0.05 * error)
        if training:
            self.reconstruction_error.update_state(error)
        return self.out(hidden)


C7_START = start((10, 8), 8, (8, 1), 1, (8, 10), 10)


def c7():
    """`fit` of that model. Returns the loss and the error of the reconstruction by epoch."""
    x, y = diabetes()
    model = ReconstructingRegressor()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model(x[:1])
    model.set_weights(C7_START)
    return fit(model, x[:440], y[:440], batch_size=88, epochs=8)


@functools.cache
def on_three_backends():
    with tempfile.TemporaryDirectory() as folder:
        return arrays_by_backend("tests.rows.curves", Path(folder))


def assert_same_on_three_backends(curve):
    """Returns the largest difference between backends."""
    found = [curves[curve] for curves in on_three_backends().values()]
    for other in found[1:]:
        close(other, found[0], rtol=1e-4)
    return np.ptp(found, axis=0).max()


def main(file):
    warnings.simplefilter("error", HandloomWarning)  # A step that falls back is not compiled.
    np.savez(file, **{f"{run.__name__}/{name}": curve for run in (a1, c7) for name, curve in run().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
