"""Row F5: curves and a profile, as TensorBoard reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
from keras import layers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import handloom as hl
from handloom.callbacks import TensorBoard
from tests.callbacks.traces import products
from tests.numbers import close
from tests.rows.real_data import digits


def trained(logs):
    """A classifier of digits, five epochs of ten steps; returns its history."""
    x, y = digits()
    model = hl.Sequential([layers.Dense(32, activation="relu"), layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    options = {"validation_data": (x[320:640], y[320:640]), "callbacks": [TensorBoard(logs, profile_batch=(12, 14))]}
    return model.fit(x[:320], y[:320], batch_size=32, epochs=5, verbose=0, **options).history


def curves(run):
    """The curves over epochs by name."""
    read = EventAccumulator(str(run))
    read.Reload()
    events = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"] if tag.startswith("epoch_")}
    assert all([event.step for event in found] == list(range(5)) for found in events.values())
    return {tag.removeprefix("epoch_"): [event.value for event in found] for tag, found in events.items()}


def test_f5_tensorboard_reads_the_curves_and_the_profile(tmp_path, shown):
    history = trained(tmp_path)
    training, validation = curves(tmp_path / "train"), curves(tmp_path / "validation")
    assert history["loss"][-1] < history["loss"][0]
    assert set(training) == {"loss", "accuracy", "learning_rate"}
    for name in ("loss", "accuracy"):
        close(training[name], history[name], rtol=1e-6)
        close(validation[name], history[f"val_{name}"], rtol=1e-6)
    found = products(tmp_path / "train")
    assert found > 0
    assert found % 3 == 0  # The same number in each of three steps.
    shown("curves as in the history (rtol 1e-6), a profile with the operations of 3 steps")


@pytest.mark.backend("jax", "torch")  # Slow: loads Keras and the backend once more.
def test_f5_tensorboard_does_not_need_tensorflow(tmp_path):
    code = f"""
import sys
sys.modules["tensorflow"] = None  # As if it were not installed.
from tests.rows.test_f_tensorboard import trained
trained({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
    assert products(tmp_path / "train") > 0
