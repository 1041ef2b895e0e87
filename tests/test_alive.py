"""The smallest run, as a smoke test before a commit."""

import numpy as np
from keras import layers, ops

import handloom as hl


class Regressor(hl.Model):
    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))}


def test_fit_learns_a_line():
    x = np.linspace(-1, 1, 256, dtype="float32")[:, None]
    model = Regressor([layers.Dense(1)])
    model.compile("adam", jit_compile="auto")
    history = model.fit(x, 2 * x + 1, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
