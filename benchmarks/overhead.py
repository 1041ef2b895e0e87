"""The cost of a training step in Keras's `fit`, a loop by hand, native torch, and `hl.Model.fit`.

Each of them trains the same model on the same batches (32 examples, Adam, mean squared error) and reports the mean
loss of each epoch. Rounds are interleaved, in a new order each, since the machine's speed drifts; the ratios are
medians over rounds, and only they mean something.

    python benchmarks/overhead.py [--backend jax --backend torch ...] [--rounds 9] [--epochs 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

STEPS, BATCH = 1000, 32


def main() -> None:
    arguments = _arguments()
    if arguments.inside:
        run(arguments.backend[0], arguments.rounds, arguments.epochs)
        return
    for backend in arguments.backend or [name for name in ("jax", "tensorflow", "torch") if _installed(name)]:
        command = [sys.executable, __file__, "--inside", "--backend", backend]
        options = ["--rounds", str(arguments.rounds), "--epochs", str(arguments.epochs)]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([*command, *options], check=True, env=environment)


def run(backend: str, rounds: int, epochs: int) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    for kind, shape in {"tiny": (32,), "conv": (8, 8, 1)}.items():
        x = random.standard_normal((STEPS * BATCH, *shape), dtype="float32")
        y = random.standard_normal((STEPS * BATCH, 1), dtype="float32")
        contestants = _contestants(backend, kind, x, y)
        for train in contestants.values():
            train(1)  # Compiles.
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name in random.permutation(list(contestants)):
                time.sleep(0.3)  # Threads of the contestant before, torch's above all, spin for a while when idle.
                begun = time.perf_counter()
                contestants[name](epochs)
                times[name].append((time.perf_counter() - begun) / (epochs * STEPS) * 1e6)
        _report(backend, kind, times)


def _contestants(backend: str, kind: str, x, y) -> dict[str, Callable[[int], None]]:
    import by_hand
    import keras

    import handloom as hl

    def fit(cls: type) -> Callable[[int], None]:
        model = by_hand.model(kind, cls)
        model.compile(keras.optimizers.Adam(), "mse")
        return lambda epochs: model.fit(x, y, batch_size=BATCH, shuffle=False, epochs=epochs, verbose=0)

    contestants = {"Keras fit": fit(keras.Model), "by hand": by_hand.LOOPS[backend](kind, x, y, BATCH)}
    if importlib.util.find_spec("torch"):
        contestants["native torch"] = by_hand.native_torch(kind, x, y, BATCH)
    contestants["hl.Model.fit"] = fit(hl.Model)
    return contestants


def _report(backend: str, kind: str, times: dict[str, list[float]]) -> None:
    ours = times["hl.Model.fit"]
    print(f"\n{backend}, {kind}: microseconds a step (median), and hl.Model.fit as a ratio to each")
    for name, measured in times.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, measured, strict=True))
        print(f"  {name:14} {statistics.median(measured):8.1f}   {ratio:5.2f}")
    sys.stdout.flush()


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(backend) is not None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=["jax", "tensorflow", "torch"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
