"""The cost of saving: steps of a model with ten million parameters, saved every 50 steps and not saved.

Both run in one process, in alternating blocks of 50 steps. Saving continues in the background while the next steps run.
Each step is timed by itself, the first together with the save before it. The time of a block is the sum of the medians
of its steps over all blocks, which leaves out other work of the machine.

    KERAS_BACKEND=jax python benchmarks/saving.py [--blocks 24] [--units 2232]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time

EVERY, BATCH = 50, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24, help="Of each kind.")
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

    def seconds_of(block: int, saves: bool) -> list[float]:
        times = [time.perf_counter()]
        if saves:
            checkpointer.save(block)
        for _ in range(EVERY):
            float(step(x))
            times.append(time.perf_counter())
        checkpointer.wait()
        return [after - before for before, after in itertools.pairwise(times)]

    found: dict[bool, list[list[float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name, hl.Checkpointer(name, [model, optimizer], keep=1) as checkpointer:
        seconds_of(0, saves=True)  # Compiles.
        for block in range(1, arguments.blocks + 1):
            for saves in (False, True) if block % 2 else (True, False):
                found[saves].append(seconds_of(block, saves))
    without, beside = (sum(map(statistics.median, zip(*found[saves], strict=True))) for saves in (False, True))
    size = f"{model.count_params() / 1e6:.1f}M parameters"
    print(f"{keras.backend.backend()}: {size}, {without / EVERY * 1e3:.0f} ms a step")
    print(f"with a save every {EVERY} steps: {beside / without:.3f} of the time without")


if __name__ == "__main__":
    main()
