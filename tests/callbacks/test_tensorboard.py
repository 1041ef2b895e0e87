"""Scalars for TensorBoard, read back by TensorBoard's own reader."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import handloom as hl
from handloom.callbacks import TensorBoard
from tests.callbacks.scripted import Scripted, X, run
from tests.callbacks.test_reduce_lr_on_plateau import TwoParts


def scalars(directory):
    """What a run holds: for each tag, pairs of step and value."""
    read = EventAccumulator(str(directory))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_train_and_validation_are_two_runs_over_epochs(tmp_path):
    step = lambda x: {"mean": ops.mean(x)}  # noqa: E731
    x = np.ones(4, "float32")
    hl.fit(step, x, epochs=2, validate=(step, 2 * x), callbacks=[TensorBoard(tmp_path)], verbose=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "validation"]
    assert scalars(tmp_path / "train") == {"epoch_mean": [(0, 1.0), (1, 1.0)]}
    assert scalars(tmp_path / "validation") == {
        "epoch_mean": [(0, 2.0), (1, 2.0)],
        "evaluation_mean_vs_iterations": [(1, 2.0), (2, 2.0)],
    }


def test_the_learning_rate_is_there_unasked(tmp_path, eagerly):
    run(Scripted([3, 1, 2]), TensorBoard(str(tmp_path)))
    read = scalars(tmp_path / "train")
    assert read["epoch_loss"] == [(0, 3.0), (1, 1.0), (2, 2.0)]
    assert read["epoch_learning_rate"] == [(epoch, pytest.approx(0.1)) for epoch in range(3)]


def test_optimizers_by_name_have_a_rate_each(tmp_path):
    model = TwoParts()
    model.compile({"generator": keras.optimizers.SGD(1.0), "critic": keras.optimizers.SGD(2.0)})
    model.fit(X, callbacks=[TensorBoard(tmp_path)], verbose=0)
    read = scalars(tmp_path / "train")
    assert (read["epoch_learning_rate_generator"], read["epoch_learning_rate_critic"]) == ([(0, 1.0)], [(0, 2.0)])


def test_within_epochs_the_values_so_far_stand_over_steps(tmp_path):
    model = Scripted([1, 3, 5, 7, 2, 4, 6, 8])
    callback = TensorBoard(tmp_path, every=hl.every(steps=2))
    model.fit(X, batch_size=1, epochs=2, callbacks=[callback], verbose=0)
    read = scalars(tmp_path / "train")
    assert read["batch_loss"] == [(2, 2.0), (4, 4.0), (6, 3.0), (8, 5.0)]
    assert read["epoch_loss"] == [(0, 4.0), (1, 5.0)]


def test_every_so_many_epochs(tmp_path):
    run(Scripted(range(5)), TensorBoard(tmp_path, every=hl.every(epochs=2)))
    assert scalars(tmp_path / "train")["epoch_loss"] == [(1, 1.0), (3, 3.0)]


def test_between_its_times_it_does_not_wait_for_the_device(tmp_path, reads):
    model = Scripted(range(8))
    x = np.zeros((8, 1), "float32")
    model.fit(x, batch_size=1, callbacks=[TensorBoard(tmp_path, every=hl.every(steps=4)), reads], verbose=0)
    assert reads.before_step == [False, False, False, False, True, False, False, False]


def test_what_is_no_number_is_left_out(tmp_path):
    more = {"table": np.eye(2), "word": "a", "whole": 3}
    add = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(more))
    run(Scripted([1]), add, TensorBoard(tmp_path))
    assert set(scalars(tmp_path / "train")) == {"epoch_loss", "epoch_whole", "epoch_learning_rate"}


def test_two_runs_in_a_directory_keep_both(tmp_path):
    model = Scripted(range(4))
    for first in (0, 2):
        model.fit(X, initial_epoch=first, epochs=first + 2, callbacks=[TensorBoard(tmp_path)], verbose=0)
    assert scalars(tmp_path / "train")["epoch_loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_files_are_complete(tmp_path, error):
    def fail(epoch, logs):
        if epoch == 2:
            raise error

    callback = TensorBoard(tmp_path)
    with pytest.raises(error):
        run(Scripted(range(4)), callback, keras.callbacks.LambdaCallback(on_epoch_begin=fail))
    assert callback._writers == {}
    assert scalars(tmp_path / "train")["epoch_loss"] == [(0, 0.0), (1, 1.0)]


def test_before_there_is_something_to_write_nothing_is_written(tmp_path):
    TensorBoard(tmp_path / "logs")
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_by_itself_is_written_too(tmp_path):
    model = Scripted([4])
    model.test_step = lambda data: {"mean": ops.mean(data)}
    model.evaluate(X, callbacks=[TensorBoard(tmp_path)], verbose=0)
    assert scalars(tmp_path / "validation") == {"evaluation_mean_vs_iterations": [(0, 0.0)]}


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "handloom\[tensorboard\]"'):
        TensorBoard()


@pytest.mark.backend("jax")
def test_tensorflow_is_not_imported(tmp_path):
    code = f"""
import sys, handloom as hl, keras, numpy as np
callback = hl.callbacks.TensorBoard({str(tmp_path)!r})
hl.fit(lambda x: {{"x": keras.ops.mean(x)}}, np.ones(4), callbacks=[callback], verbose=0)
print("tensorflow" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
