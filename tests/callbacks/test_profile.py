"""Profiles of a few steps: which, where they are written, and that a run is traced once."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom.callbacks import TensorBoard
from tests.callbacks.traces import products

X, Y = np.ones((320, 8), "float32"), np.ones((320, 1), "float32")


@pytest.fixture
def model():
    """Of ten steps an epoch, all of which have been compiled."""
    made = hl.Sequential([layers.Dense(16, "relu"), layers.Dense(1)])
    made.compile("adam", "mse", steps_per_execution=1)
    made.fit(X, Y, verbose=0)
    return made


def profiled(model, directory, profile_batch, **options):
    """How many products of matrices a profile holds."""
    callback = TensorBoard(directory, profile_batch=profile_batch)
    model.fit(X, Y, callbacks=[callback], verbose=0, **options)
    return products(directory / "train")


def traces(directory):
    return [path for path in directory.rglob("*") if path.name.endswith((".xplane.pb", ".pt.trace.json"))]


def test_as_many_steps_are_traced_as_asked_for(model, tmp_path):
    of_one = profiled(model, tmp_path / "one", 4)
    assert of_one > 0
    assert profiled(model, tmp_path / "three", (2, 4)) == 3 * of_one
    assert profiled(model, tmp_path / "in the next epoch", (15, 15), epochs=2) == of_one
    assert profiled(model, tmp_path / "over two epochs", (10, 11), epochs=2) == 2 * of_one


def test_a_run_that_ends_first_leaves_what_it_has(model, tmp_path):
    of_one = profiled(model, tmp_path / "one", 4)
    assert profiled(model, tmp_path / "two", (9, 99)) == 2 * of_one


def test_an_exception_ends_the_trace_and_leaves_what_it_has(model, tmp_path):
    def fail(batch, logs):
        if batch == 4:
            raise RuntimeError

    failing = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    with pytest.raises(RuntimeError):
        model.fit(X, Y, callbacks=[failing, TensorBoard(tmp_path / "failed", profile_batch=(4, 9))], verbose=0)
    assert products(tmp_path / "failed" / "train") == 2 * profiled(model, tmp_path / "one", 4)


def test_steps_that_are_dispatched_together_are_traced_together(tmp_path):
    model = hl.Sequential([layers.Dense(16, "relu"), layers.Dense(1)])
    model.compile("adam", "mse", steps_per_execution=5)
    model.fit(X, Y, epochs=2, callbacks=[TensorBoard(tmp_path, profile_batch=4)], verbose=0)
    assert len(traces(tmp_path)) == 1


def test_none_is_written_unless_asked_for(model, tmp_path):
    model.fit(X, Y, callbacks=[TensorBoard(tmp_path)], verbose=0)
    assert traces(tmp_path) == []


def test_a_callback_used_again_traces_the_new_run_too(model, tmp_path):
    callback = TensorBoard(tmp_path, profile_batch=2)
    for _ in range(2):
        model.fit(X, Y, callbacks=[callback], verbose=0)
        [trace] = traces(tmp_path)
        trace.unlink()


@pytest.mark.parametrize(("step", "in_the_first_epoch"), [(2, 1), (14, 0)])
def test_a_run_that_goes_on_is_traced_once(model, tmp_path, step, in_the_first_epoch):
    for epochs, expected in ((1, in_the_first_epoch), (2, 1 - in_the_first_epoch)):
        callback = TensorBoard(tmp_path / f"{epochs}", profile_batch=step)
        model.fit(X, Y, epochs=epochs, run_dir=tmp_path / "run", callbacks=[callback], verbose=0)
        assert len(traces(tmp_path / f"{epochs}")) == expected


@pytest.mark.parametrize("strange", [-1, 2.5, "10,20", (3,), (4, 2), (0, 5), True, (1, 2, 3)])
def test_what_is_no_range_of_steps_is_an_error(strange, tmp_path):
    with pytest.raises(ValueError, match=r"such as \(10, 20\), or 0 for no profile"):
        TensorBoard(tmp_path, profile_batch=strange)
