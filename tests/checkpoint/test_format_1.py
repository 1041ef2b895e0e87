"""Checkpoints of format 1, written by an earlier version: they are read, verified, and resumed from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import handloom as hl
from handloom.checkpoint.format import verify
from handloom.errors import CheckpointError, HandloomWarning
from tests.checkpoint.common import FILES, MANIFEST, flip
from tests.checkpoint.format_1.make import Position, X, Y, model
from tests.numbers import close, same

HERE = Path(__file__).parent / "format_1"


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


def test_checkpointer_restores_what_format_1_holds():
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
    trained = model()
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
