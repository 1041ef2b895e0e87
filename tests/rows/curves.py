"""The runs whose curves must be the same on three backends, from the same start; no word in them says on which."""

import functools
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning
from tests.rows.real_data import diabetes

BACKENDS = ("jax", "tensorflow", "torch")


def start(*shapes):
    """Weights to start from, drawn by NumPy."""
    random = np.random.default_rng(1)
    return [random.normal(scale=0.3, size=shape).astype("float32") for shape in shapes]


class Regressor(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(16, activation="tanh")
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(x))


def a1():
    """A whole-batch loop by hand: MSE, Adam(0.01), 100 epochs. Returns the loss before each update."""
    x, y = diabetes()
    model, optimizer = Regressor(), keras.optimizers.Adam(0.01)
    model(x[:1])
    model.set_weights(start((10, 16), 16, (16, 1), 1))

    @hl.function
    def train_step(x, y):
        return hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)

    return {"loss": np.array([float(train_step(x, y)) for _ in range(100)])}


class ReconstructingRegressor(hl.Model):
    """Also rebuilds its inputs from its hidden layer; how badly is a part of its loss, and a metric."""

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


class WithAnOwnStep(ReconstructingRegressor):
    """Its step says nothing of the added loss."""

    def train_step(self, data):
        x, y = data
        loss = self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))
        return {"loss": loss, "reconstruction_error": self.reconstruction_error.result()}


C7_START = start((10, 8), 8, (8, 1), 1, (8, 10), 10)


def c7(kind=ReconstructingRegressor):
    """`fit` of such a model. Returns the loss and the error of the reconstruction by epoch."""
    x, y = diabetes()
    model = kind()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model(x[:1])
    model.set_weights(C7_START)
    history = model.fit(x[:440], y[:440], batch_size=88, epochs=8, shuffle=False, verbose=0).history
    return {name: np.array(values) for name, values in history.items()}


@functools.cache
def on_three_backends():
    """The curves of every run by backend, each from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        files = {backend: Path(folder) / f"{backend}.npz" for backend in BACKENDS}
        processes = {backend: _started(backend, file) for backend, file in files.items()}
        for backend, process in processes.items():
            output, _ = process.communicate()
            assert process.returncode == 0, f"on {backend}:\n{output}"
        return {backend: dict(np.load(file)) for backend, file in files.items()}


def _started(backend, file):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.rows.curves", file],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"},  # They share the cores.
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main(file):
    warnings.simplefilter("error", HandloomWarning)  # A step that falls back is not compiled.
    np.savez(file, **{f"{run.__name__}/{name}": curve for run in (a1, c7) for name, curve in run().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
