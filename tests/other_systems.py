"""A trial of everything that depends on the system: `python -m tests.other_systems windows|macos DIRECTORY`."""

import importlib
import sys
from pathlib import Path

like = importlib.import_module(f"tests.like_{sys.argv[1]}")

import keras  # noqa: E402
import numpy as np  # noqa: E402

import handloom as hl  # noqa: E402
from handloom.errors import CheckpointError  # noqa: E402
from handloom.report import read_events  # noqa: E402

DIRECTORY = Path(sys.argv[2])


def saves_and_excludes_others():
    state = {"array": np.arange(3.0)}
    with hl.Checkpointer(DIRECTORY / "mine", state, keep=1) as checkpointer:
        for step in (1, 2):
            state["array"] += 1
            checkpointer.save(step)
        checkpointer.wait()
        try:
            hl.Checkpointer(DIRECTORY / "mine", state).save(3)
        except CheckpointError as error:
            print("excluded:", "is being written by process" in str(error))
    state["array"][:] = 0
    print("restored:", hl.Checkpointer(DIRECTORY / "mine", state).restore(), state["array"].tolist())
    print("left:", sorted(path.name for path in (DIRECTORY / "mine").iterdir()))


def fits_and_resumes():
    x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
    for epochs in (1, 2):
        keras.utils.set_random_seed(0)
        model = hl.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        loggers = hl.callbacks.CSVLogger(DIRECTORY / "log.csv", append=True), hl.callbacks.JSONLogger(DIRECTORY / "log")
        options = {"save": hl.every(steps=2), "keep": 1, "best": "min:loss", "callbacks": loggers, "verbose": 0}
        model.fit(x, x**2, batch_size=8, epochs=epochs, run_dir=DIRECTORY / "run", **options)
    events = [event.kind for event in read_events(DIRECTORY / "run")]
    print("fitted:", int(model.optimizer.iterations), events.count("saved") > 2, events[-1])


print("imported:", all(hasattr(hl, name) for name in hl.__all__))
saves_and_excludes_others()
fits_and_resumes()
if sys.argv[1] == "macos":
    print("flushed:", like.flushed > 0)
