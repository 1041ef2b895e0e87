"""A run that begins on one backend, and that each of the others resumes, by the same code.

python -m tests.resume.across DIRECTORY OTHER...: trains up to a step within an epoch, says so, waits for a line, and
resumes copies of the runs in its directory and in the others.
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
from tests.numbers import normal
from tests.resume.stopped import Stopped

X = normal(40, 3)
Y = np.tanh(X @ np.array([[1.0], [-2.0], [0.5]])).astype("float32")
STOP = 8  # There are five steps an epoch; every second one is saved, and three accumulate one update.


class Net(hl.Model):
    def __init__(self):
        super().__init__()
        self.low = layers.Dense(8, "tanh", use_bias=False)  # The gradient of a bias here would be noise.
        self.norm, self.head = layers.BatchNormalization(momentum=0.9), layers.Dense(1)

    def call(self, x, training=False):
        return self.head(self.norm(self.low(x), training=training))

    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2)), "first": x[0, 0]}


class Looks(keras.callbacks.Callback):
    """Notes the position and all variables before the first step, and the reports of each step; stops before one."""

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
        """Restores nothing: each process notes for itself."""

    def noted(self):
        return {"begun": self._begun, "steps": self._steps, "history": self.model.history.history}


def values(model):
    variables, _ = named({"state": {"model": model}})  # As in a run.
    return {name: ops.convert_to_numpy(variable.value) for name, variable in variables.items()}


def train(directory, run, stop=0):
    """Trains for three epochs, or until a step; writes the notes, and the variables before and after."""
    model, looks = Net(), Looks(stop)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.9)
    model.compile(GradientAccumulation(WeightAveraging(keras.optimizers.Adam(schedule)), 3))
    options = {"batch_size": 8, "epochs": 3, "run_dir": directory / run, "save": hl.every(steps=2)}
    model.fit(X, Y, callbacks=[looks], verbose=0, **options)
    (directory / f"{run}.json").write_text(json.dumps(looks.noted()), encoding="utf-8")
    np.savez(directory / f"{run} first.npz", **looks._values)
    np.savez(directory / f"{run} last.npz", **values(model))


def main(directory, others):
    with contextlib.suppress(Stopped):
        train(directory, "stopped", STOP)
    print("begun", flush=True)
    input()  # Waits until the others have begun, too.
    for other in (directory, *others):  # Nothing is seeded: weights and the order of the data come from the checkpoint.
        shutil.copytree(other / "stopped", directory / f"from {other.name}")
        train(directory, f"from {other.name}")


if __name__ == "__main__":
    own, *others = map(Path, sys.argv[1:])
    main(own, others)
