"""Checkpoints of format 1 are read, verified, and resumed from.

Those in `format_1` were written on JAX by revision d4fa7d4, the last one that wrote that format: in `run`, by `fit` of
`line()` with `X, Y, batch_size=4, epochs=2, shuffle=False, save=hl.every(steps=4), keep=1, seed=1`, interrupted after
step 10; in `state`, of a feed of `Position()` after one batch, and an array.
"""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

import handloom as hl
from handloom.checkpoint.format import verify
from handloom.errors import CheckpointError, HandloomWarning
from tests.checkpoint.common import FILES, MANIFEST, flip
from tests.models import compiled, sequential
from tests.numbers import close, same

HERE = Path(__file__).parent / "format_1"
X = np.linspace(-1, 1, 48, dtype="float32").reshape(24, 2)
Y = X[:, :1] - 2 * X[:, 1:]


def line():
    """A linear model with weights of zero."""
    model = sequential(keras.layers.Dense(1, kernel_initializer="zeros"), inputs=2)
    return compiled(model, keras.optimizers.SGD(0.1, momentum=0.9))


class Position:
    """Batches whose iterator has a position with values that JSON lacks."""

    def __iter__(self):
        self.last = Counting()
        return self.last


class Counting:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return np.float32([self.at])

    def get_state(self):
        return {1: (self.at, b"bytes", np.arange(3)), "more": {"rate": float("inf"), "count": np.int64(5)}}

    def set_state(self, state):
        self.at = state[1][0]
        self.found = state


def test_verify_reads_format_1():
    for path in (HERE / "state" / "step_000000001", HERE / "run" / "checkpoints" / "step_000000008"):
        assert json.loads((path / MANIFEST).read_bytes())["format"] == 1
        assert verify(path).step == int(path.name[-9:])


@pytest.mark.parametrize("name", FILES)
def test_load_checkpoint_finds_a_flipped_bit_in_format_1(tmp_path, name):
    path = shutil.copytree(HERE / "state" / "step_000000001", tmp_path / "step_000000001") / name
    for position in range(0, path.stat().st_size, 37):
        flip(path, position)
        with pytest.raises(CheckpointError, match=name):
            hl.load_checkpoint(tmp_path)
        flip(path, position)


def test_checkpointer_restores_format_1():
    source, array = Position(), np.zeros((2, 3))
    feed = hl.Feed(source)
    assert hl.Checkpointer(HERE / "state", {"feed": feed, "array": array}).restore() == 1
    same(array, np.arange(6.0).reshape(2, 3))
    same(next(iter(feed)), [2])  # One batch had been given.
    state = source.last.found
    assert state[1][:2] == (1, b"bytes")
    assert state[1][2].tolist() == [0, 1, 2]
    assert state["more"] == {"rate": float("inf"), "count": 5}
    assert type(state["more"]["count"]) is np.int64


def test_fit_resumes_from_a_run_of_format_1(tmp_path, capsys):
    shutil.copytree(HERE / "run", tmp_path / "run")
    trained = line()
    with pytest.warns(HandloomWarning, match="begin at the resumed step"):
        trained.fit(X, Y, batch_size=4, epochs=2, shuffle=False, run_dir=tmp_path / "run", verbose=2)
    assert f"Resuming from {tmp_path / 'run' / 'checkpoints'} at step 8 (epoch 2, batch 2)." in capsys.readouterr().out

    weight, velocity = np.zeros((3, 1)), np.zeros((3, 1))  # Of two inputs and the bias.
    for _ in range(2):
        for start in range(0, 24, 4):
            x, y = np.c_[X[start : start + 4], np.ones(4)], Y[start : start + 4]
            velocity = 0.9 * velocity - 0.1 * 2 / 4 * x.T @ (x @ weight - y)
            weight = weight + velocity
    assert int(trained.optimizer.iterations) == 12
    kernel, bias = trained.get_weights()
    close(np.r_[kernel, [bias]], weight, rtol=1e-4)
    assert trained.history.epoch == [0, 1]
