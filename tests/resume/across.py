"""A run that one backend begins, and each of the others goes on with; no word in it says which.

python -m tests.resume.across DIRECTORY OTHER...: trains up to within an epoch, says so, waits for a line, and goes on
with copies of what is in its directory and the others.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import GradientAccumulation, WeightAveraging
from tests.resume.stopped import Stopped

numbers = np.random.default_rng(0)
X = numbers.normal(size=(40, 3)).astype("float32")
Y = np.tanh(X @ np.array([[1.0], [-2.0], [0.5]])).astype("float32")
STOP = 8  # Of five steps an epoch; saved after each second one, gathered by threes.


class Net(hl.Model):
    def __init__(self):
        super().__init__()
        self.low = layers.Dense(8, "tanh", use_bias=False)  # A bias before the next layer has no gradient but noise.
        self.norm, self.head = layers.BatchNormalization(momentum=0.9), layers.Dense(1)

    def call(self, x, training=False):
        return self.head(self.norm(self.low(x), training=training))

    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2)), "first": x[0, 0]}


class Looks(keras.callbacks.Callback):
    """Notes the place and all variables before the first step, and what each step reports; stops before one."""

    def __init__(self, stop=0):
        super().__init__()
        self._stop, self._steps, self._begun, self._values = stop, [], None, {}

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self._begun is None:
            self._begun, self._values = [self._epoch, batch], values(self.model)
        self._stop -= 1
        if self._stop == 0:
            raise Stopped

    def on_train_batch_end(self, batch, logs=None):
        self._steps.append([float(logs["loss"]), float(logs["first"])])

    def state(self):
        return {}

    def restore(self, state):
        """Each process notes for itself."""

    def noted(self):
        return {"begun": self._begun, "steps": self._steps, "history": self.model.history.history}


def values(model):
    variables, _ = named({"state": {"model": model}})  # As in a run.
    return {name: ops.convert_to_numpy(variable.value) for name, variable in variables.items()}


def train(directory, run, stop=0):
    """Trains three epochs, or up to before a step; writes what was noted, and the variables before and after."""
    model, looks = Net(), Looks(stop)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.9)
    model.compile(GradientAccumulation(WeightAveraging(keras.optimizers.Adam(schedule)), 3))
    options = {"batch_size": 8, "epochs": 3, "run_dir": directory / run, "save": hl.every(steps=2)}
    model.fit(X, Y, callbacks=[looks], verbose=0, **options)
    (directory / f"{run}.json").write_text(json.dumps(looks.noted()), encoding="utf-8")
    np.savez(directory / f"{run} first.npz", **looks._values)
    np.savez(directory / f"{run} last.npz", **values(model))


def go_on(directory, other):
    """Nothing is seeded: weights and the order of the data come from there alone."""
    shutil.copytree(other / "stopped", directory / f"from {other.name}")
    train(directory, f"from {other.name}")


def main(directory, others):
    with contextlib.suppress(Stopped):
        train(directory, "stopped", STOP)
    print("begun", flush=True)
    input()  # Until the others have.
    for other in (directory, *others):
        go_on(directory, other)


if __name__ == "__main__":
    own, *others = map(Path, sys.argv[1:])
    main(own, others)
