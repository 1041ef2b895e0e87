"""A table of epochs, as comma-separated values."""

import csv
import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from handloom.callbacks import CSVLogger
from tests.callbacks.scripted import Scripted, feed, run

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class NullModel:
    stop_training = False


def written(path, logs, first=0, **options):
    """Feeds the logs of epochs to a logger; the rows in its file."""
    logger = CSVLogger(path, **options)
    feed(logger, logs, NullModel(), first)
    logger.on_train_end({})
    return rows(path)


def rows(path, **options):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, **options))


def test_it_holds_what_the_history_does(tmp_path):
    history = run(Scripted([0.1, 1 / 3, 1e-30]), CSVLogger(tmp_path / "log.csv"))
    header, *values = rows(tmp_path / "log.csv")
    assert header == ["epoch", "loss"]
    assert [(int(epoch), float(loss)) for epoch, loss in values] == list(enumerate(history["loss"]))


def test_a_name_that_appears_later_gets_a_column(tmp_path):
    logs = [{"loss": 3.0}, {"loss": 2.0, "val_loss": 5.0}, {"loss": 1.0, "lr": 0.5}]
    assert written(tmp_path / "log.csv", logs) == [
        ["epoch", "loss", "val_loss", "lr"],
        ["0", "3.0", "NA", "NA"],
        ["1", "2.0", "5.0", "NA"],
        ["2", "1.0", "NA", "0.5"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.floats(allow_nan=False)), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_whatever_is_reported_nothing_is_lost(tmp_path_factory, logs):
    path = tmp_path_factory.mktemp("csv") / "log.csv"
    written(path, logs)
    with path.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [int(row.pop("epoch")) for row in read] == list(range(len(logs)))
    found = [{name: float(value) for name, value in row.items() if value != "NA"} for row in read]
    assert found == logs


def test_a_file_that_is_there_is_replaced(tmp_path):
    written(tmp_path / "log.csv", [{"loss": 3.0}, {"loss": 2.0}])
    assert written(tmp_path / "log.csv", [{"error": 1.0}]) == [["epoch", "error"], ["0", "1.0"]]


def test_or_appended_to_under_the_names_it_has(tmp_path):
    written(tmp_path / "log.csv", [{"loss": 3.0, "error": 4.0}])
    assert written(tmp_path / "log.csv", [{"error": 1.0, "new": 7.0, "loss": 2.0}], first=1, append=True) == [
        ["epoch", "loss", "error", "new"],
        ["0", "3.0", "4.0", "NA"],
        ["1", "2.0", "1.0", "7.0"],
    ]


@pytest.mark.parametrize("content", [None, ""])
def test_to_append_to_no_file_or_an_empty_one_is_to_begin(tmp_path, content):
    if content is not None:
        (tmp_path / "log.csv").write_text(content)
    assert written(tmp_path / "log.csv", [{"loss": 3.0}], append=True) == [["epoch", "loss"], ["0", "3.0"]]


def test_a_row_that_a_crash_cut_short_harms_no_other(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,error\n0,3.0,4.0\n1,2.", encoding="utf-8")
    assert written(tmp_path / "log.csv", [{"loss": 1.0, "error": 1.5}], first=2, append=True) == [
        ["epoch", "loss", "error"],
        ["0", "3.0", "4.0"],
        ["1", "2.", "NA"],
        ["2", "1.0", "1.5"],
    ]


def test_one_logger_serves_several_runs(tmp_path):
    logger = CSVLogger(tmp_path / "log.csv", append=True)
    for _ in range(2):
        run(Scripted([1, 2]), logger)
    assert [row[0] for row in rows(tmp_path / "log.csv")] == ["epoch", "0", "1", "0", "1"]


def test_values_of_all_kinds_can_be_read_back(tmp_path):
    logs = {
        "array": np.array([1.0, 2.5]),
        "table": np.array([[1, 2], [3, 4]]),
        "zero": np.array(0.5),
        "integer": np.int64(7),
        "single": np.float32(0.1),
        "word": 'warm, "still"\nwarmer',
        "nan": np.nan,
    }
    [header, values] = written(tmp_path / "log.csv", [logs])
    read = dict(zip(header, values, strict=True))
    assert json.loads(read["array"]) == [1.0, 2.5]
    assert json.loads(read["table"]) == [[1, 2], [3, 4]]
    assert (read["zero"], read["integer"], read["word"], read["nan"]) == ("0.5", "7", logs["word"], "nan")
    assert np.float32(read["single"]) == logs["single"]


def test_another_separator(tmp_path):
    logger = CSVLogger(str(tmp_path / "log.csv"), separator=";")
    feed(logger, [{"a": 1.0}, {"a": 2.0, "b": 3.0}], NullModel())
    logger.close()
    assert rows(tmp_path / "log.csv", delimiter=";") == [["epoch", "a", "b"], ["0", "1.0", "NA"], ["1", "2.0", "3.0"]]


def test_rows_can_be_read_while_training_goes_on(tmp_path):
    path, counts = tmp_path / "deep" / "log.csv", []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(rows(path))))
    run(Scripted([1, 2, 3]), CSVLogger(path), note)
    assert counts == [2, 3, 4]


def test_validation_and_what_other_callbacks_add_is_written(tmp_path):
    add = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(extra=epoch))
    step = lambda x: {"mean": ops.mean(x)}  # noqa: E731
    x = np.ones(4, "float32")
    hl.fit(step, x, epochs=2, validate=(step, 2 * x), callbacks=[add, CSVLogger(tmp_path / "log.csv")], verbose=0)
    assert rows(tmp_path / "log.csv") == [
        ["epoch", "mean", "val_mean", "extra"],
        *[[str(n), "1.0", "2.0", str(n)] for n in (0, 1)],
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_it_is_closed_and_the_model_trains_on(tmp_path, error, eagerly):
    x = np.ones((4, 1), "float32")
    model = hl.Model([keras.Input((1,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    logger = CSVLogger(tmp_path / "log.csv")

    def fail(batch, logs):
        if logger.rows == 1:
            raise error

    with pytest.raises(error):
        model.fit(
            x, x, epochs=3, callbacks=[logger, keras.callbacks.LambdaCallback(on_train_batch_end=fail)], verbose=0
        )
    assert logger._file is None
    assert [row[0] for row in rows(tmp_path / "log.csv")] == ["epoch", "0"]
    assert len(model.fit(x, x, epochs=2, callbacks=[logger], verbose=0).epoch) == 2
    assert [row[0] for row in rows(tmp_path / "log.csv")] == ["epoch", "0", "1"]


def test_a_file_that_cannot_be_written_is_found_before_training(tmp_path):
    model = Scripted([1])
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        run(model, CSVLogger(tmp_path / "taken"))
    assert float(model.count) == 0
