"""A log that programs can read: one JSON object a line."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.callbacks import JSONLogger
from tests.run.run_log import epochs_in

X = np.arange(10, dtype="float32")  # In batches of 2: five steps an epoch.


def step(x):
    return {"mean": ops.mean(x)}


def run(*loggers, step=step, epochs=1, **options):
    hl.fit(step, hl.Feed(X, batch_size=2), epochs=epochs, callbacks=loggers, verbose=0, **options)


def lines(path):
    def refuse(constant):
        raise ValueError(f"JSON has no {constant}.")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def where(path):
    return [(line["epoch"], line["step"]) for line in lines(path)]


def test_a_line_an_epoch_holds_position_time_and_values(tmp_path):
    run(JSONLogger(tmp_path / "log.jsonl"), epochs=3)
    read = lines(tmp_path / "log.jsonl")
    assert [list(line) for line in read] == [["epoch", "step", "seconds", "mean"]] * 3
    assert where(tmp_path / "log.jsonl") == [(0, 5), (1, 10), (2, 15)]
    assert [line["mean"] for line in read] == [4.5] * 3
    assert 0 <= read[0]["seconds"] <= read[1]["seconds"] <= read[2]["seconds"]


def test_results_of_validation_are_in_the_line(tmp_path):
    run(JSONLogger(tmp_path / "log.jsonl"), validate=(step, 10 * X))
    [line] = lines(tmp_path / "log.jsonl")
    assert (line["mean"], line["val_mean"]) == (4.5, 45.0)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (hl.every(epochs=1), [(0, 5), (1, 10), (2, 15)]),
        (hl.every(epochs=2), [(1, 10)]),
        (hl.every(steps=2), [(0, 2), (0, 4), (0, 5), (1, 6), (1, 8), (1, 10), (1, 10), (2, 12), (2, 14), (2, 15)]),
        (hl.every(steps=100), [(0, 5), (1, 10), (2, 15)]),
        (hl.every(seconds=3600), [(0, 5), (1, 10), (2, 15)]),
    ],
    ids=repr,
)
def test_lines_are_written_when_asked_for(tmp_path, every, expected):
    run(JSONLogger(tmp_path / "log.jsonl", every), epochs=3)
    assert where(tmp_path / "log.jsonl") == expected


def test_a_line_every_so_many_seconds_is_written_after_a_step(tmp_path):
    run(JSONLogger(tmp_path / "log.jsonl", hl.every(seconds=1e-9)))
    assert where(tmp_path / "log.jsonl") == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 5)]


def test_a_line_within_an_epoch_holds_the_values_so_far(tmp_path):
    run(JSONLogger(tmp_path / "log.jsonl", hl.every(steps=2)), epochs=2)
    read = {(line["epoch"], line["step"]): line["mean"] for line in lines(tmp_path / "log.jsonl")}
    assert read[0, 2] == X[:4].mean()
    assert read[0, 5] == X.mean()
    assert read[1, 6] == X[:2].mean()


def test_numbers_that_json_does_not_have_are_strings(tmp_path):
    values = {"nan": np.nan, "high": np.inf, "low": -np.inf, "whole": 3, "tiny": 1e-30}
    run(JSONLogger(tmp_path / "log.jsonl"), step=lambda x: values)
    [line] = lines(tmp_path / "log.jsonl")
    assert {name: line[name] for name in values} == {
        "nan": "NaN",
        "high": "Infinity",
        "low": "-Infinity",
        "whole": 3,
        "tiny": pytest.approx(1e-30),
    }


def test_arrays_are_lists_and_what_callbacks_add_is_written_too(tmp_path):
    def add(epoch, logs):
        logs["table"] = np.array([[1.0, np.nan], [np.inf, 2.0]])
        logs["number"] = np.array(0.5)
        logs["integer"] = np.int64(7)
        logs["note"] = "warm"

    run(keras.callbacks.LambdaCallback(on_epoch_end=add), JSONLogger(tmp_path / "log.jsonl"))
    [line] = lines(tmp_path / "log.jsonl")
    assert line["table"] == [[1.0, "NaN"], ["Infinity", 2.0]]
    assert (line["number"], line["integer"], line["note"]) == (0.5, 7, "warm")


def test_lines_are_appended_to_a_file_that_is_there(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        run(JSONLogger(path))
    logger = JSONLogger(path)
    for _ in range(2):
        run(logger)
    assert where(path) == [(0, 5)] * 4


def test_directories_are_created_and_a_path_may_be_text(tmp_path):
    run(JSONLogger(str(tmp_path / "deep" / "down" / "log.jsonl")))
    assert where(tmp_path / "deep" / "down" / "log.jsonl") == [(0, 5)]


def test_nothing_is_written_before_training(tmp_path):
    JSONLogger(tmp_path / "deep" / "log.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_each_line_can_be_read_while_training_goes_on(tmp_path):
    path, counts = tmp_path / "log.jsonl", []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(lines(path))))
    run(JSONLogger(path), note, epochs=3)
    assert counts == [1, 2, 3]


@pytest.fixture
def opened(monkeypatch):
    """The files that were opened by `Path.open`."""
    files, original = [], Path.open

    def noting(self, *args, **kwargs):
        files.append(original(self, *args, **kwargs))
        return files[-1]

    monkeypatch.setattr(Path, "open", noting)
    return files


def test_the_file_is_closed_at_the_end(tmp_path, opened):
    run(JSONLogger(tmp_path / "log.jsonl"))
    assert [file.closed for file in opened] == [True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_file_is_closed_after_an_exception_and_keeps_its_lines(tmp_path, opened, error):
    def fail(epoch, logs):
        if epoch == 1:
            raise error

    logger = JSONLogger(tmp_path / "log.jsonl")
    with pytest.raises(error):
        run(logger, keras.callbacks.LambdaCallback(on_epoch_end=fail), epochs=3)
    assert [file.closed for file in opened] == [True]
    assert where(tmp_path / "log.jsonl") == [(0, 5), (1, 10)]


def test_a_run_directory_gets_a_log(tmp_path):
    run(run_dir=tmp_path / "run", epochs=2)
    assert [(line["epoch"], line["step"]) for line in epochs_in(tmp_path / "run")] == [(0, 5), (1, 10)]


def test_a_model_logs_from_the_epoch_it_begins_at(tmp_path):
    model = hl.Model([layers.Dense(1)])
    model.compile("sgd", "mse")
    path = tmp_path / "log.jsonl"
    model.fit(X[:, None], X, initial_epoch=3, epochs=5, callbacks=[JSONLogger(path)], verbose=0)
    assert where(path) == [(3, 1), (4, 2)]
    model.evaluate(X[:, None], X, callbacks=[JSONLogger(path)], verbose=0)
    assert len(lines(path)) == 2
