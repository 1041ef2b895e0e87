"""A training step in eager execution and compiled: milliseconds of both, and their ratio.

Both run the same steps from the same start (32 examples, Adam, mean squared error). Rounds are interleaved, since the
machine's speed drifts; the ratio is the median over rounds, and only it means something.

    python benchmarks/compiled.py [--backend jax --backend torch ...] [--rounds 7] [--steps 20]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

BATCH = 32
SHAPES = {"dense": (32,), "deep": (32,), "conv": (8, 8, 1)}


def main() -> None:
    arguments = _arguments()
    if arguments.inside:
        print(table(arguments.rounds, arguments.steps), flush=True)
        return
    for backend in arguments.backend or filter(importlib.util.find_spec, ("jax", "tensorflow", "torch")):
        options = ["--inside", "--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, __file__, *options], check=True, env=environment)


def table(rounds: int, steps: int) -> str:
    """Times by model, on the backend of this process."""
    import keras

    rows = [f"\n{keras.backend.backend():12} {'eager, ms':>14} {'compiled, ms':>14} {'ratio':>8}"]
    for kind in SHAPES:
        eager, compiled = zip(*_times(kind, rounds, steps), strict=True)
        ratio = statistics.median(slow / fast for slow, fast in zip(eager, compiled, strict=True))
        rows.append(f"{kind:12} {statistics.median(eager):14.2f} {statistics.median(compiled):14.2f} {ratio:8.1f}")
    return "\n".join(rows)


def _times(kind: str, rounds: int, steps: int) -> Iterator[tuple[float, float]]:
    """Milliseconds per step, eager and compiled, round by round."""
    import handloom as hl

    def milliseconds(train: Callable[[int], list[float]], eagerly: bool) -> float:
        with hl.run_eagerly(eagerly):
            begun = time.perf_counter()
            train(steps)
            return (time.perf_counter() - begun) / steps * 1e3

    op_by_op, compiled = training(kind), training(kind)
    for number in range(rounds + 1):
        pair = milliseconds(op_by_op, True), milliseconds(compiled, False)
        if number > 0:  # The first round builds and compiles.
            yield pair


def training(kind: str, on_run: Callable[[], None] = lambda: None) -> Callable[[int], list[float]]:
    """A function that takes so many steps, and returns the loss before each; every one begins with the same weights.

    Whenever Python runs the step, it calls `on_run`.
    """
    import keras
    import numpy as np
    from keras import ops

    import handloom as hl

    keras.utils.set_random_seed(0)
    model, optimizer = _model(kind), keras.optimizers.Adam()
    random = np.random.default_rng(0)
    x = random.standard_normal((BATCH, *SHAPES[kind]), dtype="float32")
    y = random.standard_normal((BATCH, 1), dtype="float32")

    @hl.function
    def step(x, y):
        on_run()
        return hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)

    return lambda steps: [float(loss) for loss in [step(x, y) for _ in range(steps)]]


def _model(kind: str):
    import keras
    from keras import layers

    body = {
        "dense": [layers.Dense(64, "relu")],
        "deep": [layers.Dense(32, "relu") for _ in range(8)],
        "conv": [layers.Conv2D(8, 3, activation="relu"), layers.Conv2D(8, 3, activation="relu"), layers.Flatten()],
    }
    return keras.Sequential([keras.Input(SHAPES[kind]), *body[kind], layers.Dense(1)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=["jax", "tensorflow", "torch"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
