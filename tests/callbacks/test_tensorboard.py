"""`TensorBoard` writes scalars, read back by its own reader; `rows/test_f_tensorboard.py` compares whole curves."""

import sys

import keras
import numpy as np
import pytest
from keras import ops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import handloom as hl
from handloom.callbacks import TensorBoard
from tests.callbacks.scripted import Scripted, TwoParts, X, at, mean_step, multi, raising, run
from tests.models import fit
from tests.numbers import ones


def scalars(directory):
    """For each tag of a run, pairs of step and value."""
    read = EventAccumulator(str(directory))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_writes_train_and_validation_as_two_runs(tmp_path):
    x = ones(4)
    hl.fit(mean_step, x, epochs=2, validate=(mean_step, 2 * x), callbacks=[TensorBoard(tmp_path)], verbose=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "validation"]
    assert scalars(tmp_path / "train") == {"epoch_mean": [(0, 1.0), (1, 1.0)]}
    assert scalars(tmp_path / "validation") == {
        "epoch_mean": [(0, 2.0), (1, 2.0)],
        "evaluation_mean_vs_iterations": [(1, 2.0), (2, 2.0)],
    }


def test_tensorboard_writes_a_rate_for_each_optimizer_by_name(tmp_path):
    model = TwoParts({"generator": keras.optimizers.SGD(1.0), "critic": keras.optimizers.SGD(2.0)})
    fit(model, X, callbacks=[TensorBoard(str(tmp_path))])
    read = scalars(tmp_path / "train")
    assert (read["epoch_learning_rate_generator"], read["epoch_learning_rate_critic"]) == ([(0, 1.0)], [(0, 2.0)])


def test_tensorboard_writes_the_rates_of_a_multi_optimizer(tmp_path):
    fit(multi(), X, callbacks=[TensorBoard(tmp_path)])
    read = scalars(tmp_path / "train")
    assert (read["epoch_learning_rate_one"], read["epoch_learning_rate_other"]) == ([(0, 1.0)], [(0, 2.0)])


def test_tensorboard_writes_the_values_so_far_within_epochs(tmp_path, eagerly):
    model = Scripted([1, 3, 5, 7, 2, 4, 6, 8])
    fit(model, X, batch_size=1, epochs=2, callbacks=[TensorBoard(tmp_path, every=hl.every(steps=2))])
    read = scalars(tmp_path / "train")
    assert read["batch_loss"] == [(2, 2.0), (4, 4.0), (6, 3.0), (8, 5.0)]
    assert read["epoch_loss"] == [(0, 4.0), (1, 5.0)]


def test_tensorboard_writes_every_few_epochs(tmp_path):
    run(Scripted(range(5)), TensorBoard(tmp_path, every=hl.every(epochs=2)))
    assert scalars(tmp_path / "train")["epoch_loss"] == [(1, 1.0), (3, 3.0)]


def test_tensorboard_does_not_wait_for_the_device_between_its_times(tmp_path, reads):
    callbacks = [TensorBoard(tmp_path, every=hl.every(steps=4)), reads]
    fit(Scripted(range(8)), np.zeros((8, 1), "float32"), batch_size=1, callbacks=callbacks)
    assert reads.before_step == [False, False, False, False, True, False, False, False]


def test_tensorboard_leaves_out_values_that_are_not_numbers(tmp_path):
    more = {"table": np.eye(2), "word": "a", "whole": 3}
    run(Scripted([1]), at("on_epoch_end", lambda epoch, logs: logs.update(more)), TensorBoard(tmp_path))
    assert set(scalars(tmp_path / "train")) == {"epoch_loss", "epoch_whole", "epoch_learning_rate"}


def test_tensorboard_keeps_two_runs_in_one_directory(tmp_path):
    model = Scripted(range(4))
    for first in (0, 2):
        run(model, TensorBoard(tmp_path), initial_epoch=first, epochs=first + 2)
    assert scalars(tmp_path / "train")["epoch_loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_tensorboard_completes_its_files_after_an_error(tmp_path, error):
    callback = TensorBoard(tmp_path)
    with pytest.raises(error):
        run(Scripted(range(4)), callback, raising(error, "on_epoch_begin", 2))
    assert callback._writers == {}
    assert scalars(tmp_path / "train")["epoch_loss"] == [(0, 0.0), (1, 1.0)]


def test_tensorboard_creates_no_file_before_it_has_something_to_write(tmp_path):
    TensorBoard(tmp_path / "logs")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_an_evaluation(tmp_path):
    model = Scripted([4])
    model.test_step = lambda data: {"mean": ops.mean(data)}
    model.evaluate(X, callbacks=[TensorBoard(tmp_path)], verbose=0)
    assert scalars(tmp_path / "validation") == {"evaluation_mean_vs_iterations": [(0, 0.0)]}


def test_tensorboard_without_tensorboardx_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "handloom\[tensorboard\]".*HL903'):
        TensorBoard()
