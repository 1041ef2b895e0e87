"""Small runs with everything that has a state, and the result of one as JSON.

This module only imports: processes are forked from one that has imported it, in which no backend has run yet.
"""

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import GradientAccumulation, WeightAveraging
from tests.numbers import normal
from tests.run.run_log import epochs_in

X = normal(24, 3)
Y = X[:, :1] ** 2
BATCH = 4  # Six steps an epoch.


class Net(hl.Model):
    """A model that is built with its first batch."""

    def __init__(self):
        super().__init__()
        self.low, self.norm = layers.Dense(4, "relu"), layers.BatchNormalization()
        self.drop, self.head = layers.Dropout(0.5), layers.Dense(1)

    def call(self, x, training=False):
        return self.head(self.drop(self.norm(self.low(x), training=training), training=training))


class Tells(keras.callbacks.Callback):
    """Tells in words what a run is about to do."""

    takes_executions = True  # Steps may be dispatched together.

    def __init__(self, tell):
        super().__init__()
        self._tell = tell

    def on_train_begin(self, logs=None):
        self._tell("train")

    def on_train_batch_begin(self, batch, logs=None):
        self._tell("step")

    def on_test_begin(self, logs=None):
        self._tell("validate")

    def on_test_end(self, logs=None):
        self._tell("validated")

    def on_epoch_end(self, epoch, logs=None):
        if self.model.stop_training or epoch + 1 == self.params["epochs"]:
            self._tell("end")

    def on_train_end(self, logs=None):
        self._tell("ended")


def run_options(run_dir, keep):
    return {"seed": 1, "run_dir": run_dir, "save": hl.every(steps=3), "keep": keep, "verbose": 0}


def by_model(run_dir, tell, keep):
    """A model that stops early.

    Its head has momentum and a plateau; the rest has a schedule, averages, and accumulated gradients, in windows that
    reach over a save. A dispatch takes two steps, or one before a save.
    """
    model = Net()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9)
    rest = GradientAccumulation(WeightAveraging(keras.optimizers.Adam(schedule)), 4)
    optimizers = {"head": keras.optimizers.SGD(0.01, momentum=0.9), "*": rest}
    model.compile(optimizers, loss="mse", metrics=["mae"], steps_per_execution=2)
    callbacks = [
        hl.callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=2, restore_best_weights=True),
        hl.callbacks.ReduceLROnPlateau("val_loss", min_delta=10.0, patience=0, factor=0.5, optimizer="head"),
        Tells(tell),
    ]
    options = {"batch_size": BATCH, "epochs": 5, "callbacks": callbacks} | run_options(run_dir, keep)
    return {"model": model}, model.fit(X, Y, validation_data=(X[:12], Y[:12]), **options), callbacks


def by_step(run_dir, tell, keep):
    """A GAN: two networks and optimizers, noise with a seed of its own and without.

    Training and validation, which is within epochs, share a metric.
    """
    generator, discriminator = keras.Sequential([layers.Dense(3)]), keras.Sequential([layers.Dense(1)])
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizers = {"generator": keras.optimizers.Adam(0.05), "discriminator": sgd}
    seed, error = keras.random.SeedGenerator(), keras.metrics.MeanSquaredError(name="error")

    def step(real, y):
        noise = keras.random.normal(ops.shape(real), seed=seed) + 0.1 * keras.random.normal(ops.shape(real))

        def d_loss():
            return ops.mean(ops.softplus(-discriminator(real)) + ops.softplus(discriminator(generator(noise))))

        def g_loss():
            return ops.mean(ops.softplus(-discriminator(generator(noise))))

        error.update_state(y, discriminator(real))
        return {
            "d_loss": hl.minimize(d_loss, discriminator, optimizers["discriminator"]),
            "g_loss": hl.minimize(g_loss, generator, optimizers["generator"]),
            "error": error,
        }

    def test_step(real, y):
        error.update_state(y, discriminator(generator(real)))  # Its values of the training remain.
        return {"error": error}

    networks = {"generator": generator, "discriminator": discriminator}
    state = {**networks, "optimizers": optimizers, "seed": seed, "error": error}
    callbacks = [Tells(tell)]
    options = {"epochs": 3, "callbacks": callbacks, "validate_every": hl.every(steps=4)} | run_options(run_dir, keep)
    validate = test_step, hl.Feed((X, Y), batch_size=12)
    feed = hl.Feed((X, Y), batch_size=BATCH, shuffle=True)
    return state, hl.fit(step, feed, state=state, validate=validate, **options), callbacks


RUNS = {"model": by_model, "step": by_step}  # By `Model.fit`, and by `hl.fit`.


def outcome(kind, run_dir, tell=lambda word: None, keep=3):
    """Runs to the end; returns the result."""
    return left(run_dir, *RUNS[kind](run_dir, tell, keep))


def left(run_dir, state, history, callbacks):
    """The result of a run as JSON: in memory, in its log, in its newest checkpoint."""
    newest = hl.load_checkpoint(run_dir / "checkpoints")
    return {
        "variables": bits_of(state),
        "history": [history.epoch, history.history],
        "callbacks": [plain(hl.callbacks.callback_state(callback)) for callback in callbacks],
        "log": [plain(line) for line in epochs_in(run_dir)],
        "saved at": hl.Checkpointer(run_dir / "checkpoints", {}).steps[-1],
        "saved": {name: bits(array) for name, array in newest.arrays.items()},
        "contents": plain(newest.contents),
    }


def bits_of(state):
    """The bits of all variables of a state, by name."""
    return {name: bits(variable.value) for name, variable in named(state)[0].items()}


def assert_same(found, expected):
    """Fails unless two results are the same, and names the part that differs."""
    for part, value in expected.items():
        assert found[part] == value, part


def bits(value):
    array = ops.convert_to_numpy(value)
    return [str(array.dtype), list(array.shape), array.tobytes().hex()]


def plain(value):
    """JSON values, without durations, and without sizes in bytes, which depend on them."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items() if name not in ("seconds", "bytes")}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return bits(value) if isinstance(value, np.ndarray) else value
