"""Made the checkpoints beside this file, with the last revision that wrote format 1 (d4fa7d4), on JAX.

KERAS_BACKEND=jax python tests/checkpoint/format_1/make.py
"""

import contextlib
from pathlib import Path

import keras
import numpy as np
from keras import layers

import handloom as hl

HERE = Path(__file__).parent
X = np.linspace(-1, 1, 48, dtype="float32").reshape(24, 2)
Y = X[:, :1] - 2 * X[:, 1:]


class Position:
    """Batches whose iterator has a position of its own, made of what JSON lacks."""

    def __iter__(self):
        self.last = Counting()
        return self.last


class Counting:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return np.float32([self.at])

    def get_state(self):
        return {1: (self.at, b"bytes", np.arange(3)), "more": {"rate": float("inf"), "count": np.int64(5)}}

    def set_state(self, state):
        self.at = state[1][0]
        self.found = state


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 10:
            raise KeyboardInterrupt


def model():
    """A line, from zero weights."""
    model = hl.Sequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss="mse")
    return model


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        model().fit(X, Y, batch_size=4, epochs=2, shuffle=False, callbacks=[Stop()], save=hl.every(steps=4), keep=1,
                    run_dir=HERE / "run", seed=1, verbose=0)  # fmt: skip
    feed = hl.Feed(Position())
    next(iter(feed))
    with hl.Checkpointer(HERE / "state", {"feed": feed, "array": np.arange(6.0).reshape(2, 3)}) as checkpointer:
        checkpointer.save(1)
