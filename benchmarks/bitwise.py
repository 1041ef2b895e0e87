"""Trains in several ways and prints a digest of each result, to compare two revisions bit by bit.

`python benchmarks/bitwise.py` trains on the backend of `KERAS_BACKEND`. `make bitwise BASE=main~3` trains on all three
backends, with the code of that revision and with the present one, and fails where a digest differs. Digests are
comparable on one machine only: processors add in different orders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.optimizers import SAM, ClipByGlobalNorm, GradientAccumulation, GradientTransforms, WeightAveraging
from handloom.recipes import digits, gan_digits


def digest(history: Any, *things: Any) -> str:
    """A hash of all variables, and one of the reported values."""
    reported = {name: [float(value).hex() for value in values] for name, values in history.history.items()}
    values = [ops.convert_to_numpy(variable.value) for thing in things for variable in thing.variables]
    return f"{_hash(*map(np.ascontiguousarray, values))} {_hash(json.dumps(reported, sort_keys=True).encode())}"


def _hash(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.data if isinstance(part, np.ndarray) else part)
    return found.hexdigest()[:16]


def classifier() -> str:
    """Digits: a plain step, its metric, validation."""
    model = digits.build()
    return digest(digits.train(model, epochs=3, verbose=0), model)


def gan() -> str:
    """Digits: two networks, two optimizers by name."""
    (real, _), _ = digits.load()
    model = gan_digits.GAN(gan_digits.build_generator(), gan_digits.build_discriminator())
    model.compile(optimizer={name: keras.optimizers.Adam(5e-4) for name in ("generator", "discriminator")})
    return digest(model.fit(real[:512], batch_size=64, epochs=2, verbose=0), model, *model.optimizer.values())


def data(count: int = 250) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels, weights."""
    numbers = np.random.default_rng(3)
    x = numbers.standard_normal((count, 12)).astype("float32")
    return x, (x[:, :3].sum(1) > 0).astype("int32"), numbers.uniform(0.5, 2, count).astype("float32")


def functional(optimizer: Any, **options: Any) -> hl.Model:
    """A compiled classifier with dropout, batch normalization, a regularizer and metrics."""
    keras.utils.set_random_seed(5)
    inputs = keras.Input((12,))
    x = layers.Dense(16, "relu", kernel_regularizer="l2")(inputs)
    x = layers.Dropout(0.2)(layers.BatchNormalization()(x))
    model = hl.Model(inputs, layers.Dense(2)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], weighted_metrics=["sparse_categorical_accuracy"], **options)
    return model


def gathered() -> Any:
    """Accumulation around averages around clipping around Adam with a schedule."""
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 40)
    return GradientAccumulation(
        WeightAveraging(GradientTransforms(keras.optimizers.Adam(rate), [ClipByGlobalNorm(0.1)]), 0.9), 3
    )


def trained(model: hl.Model, epochs: int = 4, **options: Any) -> str:
    """What `fit` with weights and validation leaves."""
    x, y, weights = data()
    held_out = data(70)
    history = model.fit(
        x, y, sample_weight=weights, epochs=epochs, validation_data=held_out, seed=7, verbose=0, **options
    )
    return digest(history, model, model.optimizer)


class Stop(keras.callbacks.Callback):
    """Ends the process's run, as a crash would, after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.steps -= 1
        if not self.steps:
            raise RuntimeError("stopped")


def resumed() -> str:
    """A run stopped within an epoch, after a save, and gone on with by another model."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"run_dir": Path(directory) / "run", "save": hl.every(steps=5)}
        with contextlib.suppress(RuntimeError):
            trained(functional(gathered()), callbacks=[Stop(13)], **options)
        return trained(functional(gathered()), **options)


def by_hand() -> str:
    """A loop of the user's own."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((12,)), layers.Dense(8, "relu", kernel_regularizer="l2"), layers.Dense(2)])
    optimizer, loss_fn = keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.get("sparse_categorical_crossentropy")

    @hl.function
    def step(x: Any, y: Any) -> Any:
        loss, gradients = hl.value_and_grad(
            lambda: ops.mean(loss_fn(y, ops.softmax(model(x, training=True)))) + sum(model.losses), wrt=model
        )()
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    feed = hl.Feed(data()[:2], batch_size=32, shuffle=True)
    history = keras.callbacks.History()
    history.history["loss"] = [float(ops.convert_to_numpy(step(*batch))) for _ in range(3) for batch in feed]
    return digest(history, model, optimizer)


def half() -> str:
    """Mixed precision, with its scaled loss."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return trained(functional(keras.optimizers.Adam(1e-2)), epochs=2)
    finally:
        keras.config.set_dtype_policy(before)


def compiled_kernels() -> str:
    """By the backend's kernel compiler."""
    return trained(functional(keras.optimizers.Adam(1e-2), jit_compile=True), epochs=2)


WAYS: dict[str, Callable[[], str]] = {
    "digits classifier": classifier,
    "GAN": gan,
    "accumulation, EMA, clipping": lambda: trained(functional(gathered())),
    "resume": resumed,
    "four steps a dispatch": lambda: trained(functional(gathered(), steps_per_execution=4)),
    "eager": lambda: trained(functional(gathered(), run_eagerly=True), epochs=1),
    "SAM": lambda: trained(functional(SAM(keras.optimizers.Adam(1e-2))), epochs=2),
    "float16": half,
    "loop by hand": by_hand,
    "kernel compiler": compiled_kernels,
}

if __name__ == "__main__":
    found = {}
    for name, way in WAYS.items():
        keras.utils.set_random_seed(0)
        found[name] = way()
        print(name, found[name], file=sys.stderr)
    print(json.dumps({keras.backend.backend(): found}))
