"""Small runs in which everything is that has a state, and what is left of one when it has ended.

A module that only imports: processes are forked from one that has imported it, where no backend has run yet.
"""

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import GradientAccumulation, WeightAveraging
from tests.run.run_log import epochs_in

numbers = np.random.default_rng(0)
X = numbers.normal(size=(24, 3)).astype("float32")
Y = X[:, :1] ** 2
BATCH = 4  # Six steps an epoch.


class Net(hl.Model):
    """Not built until its first batch comes."""

    def __init__(self):
        super().__init__()
        self.low, self.norm = layers.Dense(4, "relu"), layers.BatchNormalization()
        self.drop, self.head = layers.Dropout(0.5), layers.Dense(1)

    def call(self, x, training=False):
        return self.head(self.drop(self.norm(self.low(x), training=training), training=training))


class Tells(keras.callbacks.Callback):
    """Tells what a run is about to do."""

    takes_executions = True  # Steps may go together.

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
    """A model that stops early: momentum and a plateau for its head; a schedule, averages, gathered gradients for the
    rest, in windows that reach from one save over the next; two steps in a dispatch, or one before a save.
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
    history = model.fit(
        X,
        Y,
        batch_size=BATCH,
        epochs=5,
        validation_data=(X[:12], Y[:12]),
        callbacks=callbacks,
        **run_options(run_dir, keep),
    )
    return {"model": model}, history, callbacks


def by_step(run_dir, tell, keep):
    """A GAN: two networks, two optimizers, noise with and without a seed of its own; a metric that training shares with
    validation, which is within epochs.
    """
    generator, discriminator = keras.Sequential([layers.Dense(3)]), keras.Sequential([layers.Dense(1)])
    optimizers = {
        "generator": keras.optimizers.Adam(0.05),
        "discriminator": keras.optimizers.SGD(0.05, momentum=0.9),
    }
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
        error.update_state(y, discriminator(generator(real)))  # What training has gathered in it stays.
        return {"error": error}

    networks = {"generator": generator, "discriminator": discriminator}
    state = {**networks, "optimizers": optimizers, "seed": seed, "error": error}
    callbacks = [Tells(tell)]
    history = hl.fit(
        step,
        hl.Feed((X, Y), batch_size=BATCH, shuffle=True),
        epochs=3,
        state=state,
        validate=(test_step, hl.Feed((X, Y), batch_size=12)),
        validate_every=hl.every(steps=4),
        callbacks=callbacks,
        **run_options(run_dir, keep),
    )
    return state, history, callbacks


RUNS = {"model": by_model, "step": by_step}  # By `Model.fit`, and by `hl.fit`.


def outcome(kind, run_dir, tell=lambda word: None, keep=3):
    """Runs to the end; returns what is left then."""
    return left(run_dir, *RUNS[kind](run_dir, tell, keep))


def left(run_dir, state, history, callbacks):
    """All that is left of a run, as JSON: in memory, in its log, in its newest checkpoint."""
    newest = hl.load_checkpoint(run_dir / "checkpoints")
    return {
        "variables": {name: bits(variable.value) for name, variable in named(state)[0].items()},
        "history": [history.epoch, history.history],
        "callbacks": [plain(hl.callbacks.callback_state(callback)) for callback in callbacks],
        "log": [plain(line) for line in epochs_in(run_dir)],
        "saved at": hl.Checkpointer(run_dir / "checkpoints", {}).steps[-1],
        "saved": {name: bits(array) for name, array in newest.arrays.items()},
        "contents": plain(newest.contents),
    }


def bits(value):
    array = ops.convert_to_numpy(value)
    return [str(array.dtype), list(array.shape), array.tobytes().hex()]


def plain(value):
    """What is not the same in each run is left out: how long it took, and how many bytes that takes to write."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items() if name not in ("seconds", "bytes")}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return bits(value) if isinstance(value, np.ndarray) else value
