"""What saving a run costs its steps: a model of ten million parameters, saved every 50 steps, beside one that is not.

The two take turns in one process, in blocks of 50 steps each; the ratio is that of the medians over blocks. Saving
goes on in the background while the next steps run.

    KERAS_BACKEND=jax python benchmarks/saving.py [--blocks 8] [--units 2232]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

EVERY, BATCH = 50, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--units", type=int, default=2232, help="Of two hidden layers; by default 10 million weights.")
    arguments = parser.parse_args()
    import keras
    import numpy as np
    from keras import layers

    import handloom as hl

    shape = (BATCH, arguments.units)
    x = np.random.default_rng(0).standard_normal(shape, dtype="float32")
    model = keras.Sequential([keras.Input(shape[1:]), layers.Dense(arguments.units, "relu"), layers.Dense(shape[1])])
    optimizer = keras.optimizers.Adam(1e-4)
    step = hl.function(lambda x: hl.minimize(lambda: keras.ops.mean((model(x) - x) ** 2), model, optimizer))
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as directory, hl.Checkpointer(directory, [model, optimizer], keep=1) as saved:
        float(step(x))  # Compiles.
        for block in range(2 * arguments.blocks):
            saves = bool(block % 2)
            begun = time.perf_counter()
            if saves:
                saved.save(block)
            for _ in range(EVERY):
                loss = step(x)
            float(loss)
            times[saves].append(time.perf_counter() - begun)
            saved.wait()
    medians = {saves: statistics.median(seconds) for saves, seconds in times.items()}
    count = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    print(f"{keras.backend.backend()}: {count / 1e6:.1f}M parameters, {medians[False] / EVERY * 1e3:.0f} ms a step")
    print(f"with a save every {EVERY} steps: {medians[True] / medians[False]:.3f} of the time without")


if __name__ == "__main__":
    main()
