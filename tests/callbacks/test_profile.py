"""`TensorBoard(profile_batch=...)` traces a few steps of a run, once."""

import pytest
from keras import layers

import handloom as hl
from handloom.callbacks import TensorBoard
from tests.callbacks.scripted import raising
from tests.callbacks.traces import products
from tests.models import compiled, fit
from tests.numbers import ones

X, Y = ones(320, 8), ones(320, 1)


def made(steps_per_execution):
    return compiled(hl.Sequential([layers.Dense(16, "relu"), layers.Dense(1)]), steps_per_execution=steps_per_execution)


@pytest.fixture
def model():
    """A model with ten steps an epoch, all of them compiled."""
    model = made(1)
    fit(model, X, Y)
    return model


def profiled(model, directory, profile_batch, **options):
    """The number of matrix products in a profile."""
    fit(model, X, Y, callbacks=[TensorBoard(directory, profile_batch=profile_batch)], **options)
    return products(directory / "train")


def traces(directory):
    return [path for path in directory.rglob("*") if path.name.endswith((".xplane.pb", ".pt.trace.json"))]


def test_profile_batch_traces_the_steps_asked_for(model, tmp_path):
    of_one = profiled(model, tmp_path / "one", 4)
    assert of_one > 0
    assert profiled(model, tmp_path / "three", (2, 4)) == 3 * of_one
    assert profiled(model, tmp_path / "in the next epoch", (15, 15), epochs=2) == of_one
    assert profiled(model, tmp_path / "over two epochs", (10, 11), epochs=2) == 2 * of_one
    assert profiled(model, tmp_path / "beyond the end", (9, 99)) == 2 * of_one
    failing = [raising(RuntimeError, "on_train_batch_end", 4), TensorBoard(tmp_path / "failed", profile_batch=(4, 9))]
    with pytest.raises(RuntimeError):
        fit(model, X, Y, callbacks=failing)
    assert products(tmp_path / "failed" / "train") == 2 * of_one


def test_profile_batch_traces_steps_that_are_dispatched_together(tmp_path):
    fit(made(5), X, Y, epochs=2, callbacks=[TensorBoard(tmp_path, profile_batch=4)])
    assert len(traces(tmp_path)) == 1


def test_profile_batch_is_off_by_default(model, tmp_path):
    fit(model, X, Y, callbacks=[TensorBoard(tmp_path)])
    assert traces(tmp_path) == []


def test_profile_batch_traces_a_new_run_with_the_same_callback(model, tmp_path):
    callback = TensorBoard(tmp_path, profile_batch=2)
    for _ in range(2):
        fit(model, X, Y, callbacks=[callback])
        [trace] = traces(tmp_path)
        trace.unlink()


@pytest.mark.parametrize(("step", "in_the_first_epoch"), [(2, 1), (14, 0)])
def test_profile_batch_traces_a_resumed_run_once(model, tmp_path, step, in_the_first_epoch):
    for epochs, expected in ((1, in_the_first_epoch), (2, 1 - in_the_first_epoch)):
        callback = TensorBoard(tmp_path / f"{epochs}", profile_batch=step)
        fit(model, X, Y, epochs=epochs, run_dir=tmp_path / "run", callbacks=[callback])
        assert len(traces(tmp_path / f"{epochs}")) == expected


@pytest.mark.parametrize("value", [-1, 2.5, "10,20", (3,), (4, 2), (0, 5), True, (1, 2, 3)])
def test_profile_batch_takes_a_step_or_the_first_and_the_last(value, tmp_path):
    with pytest.raises(ValueError, match=r"profile_batch=\(10, 20\), or 0 for no profile\. \[HL707"):
        TensorBoard(tmp_path, profile_batch=value)
