"""`CSVLogger` writes a table of epochs as comma-separated values."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import handloom as hl
from handloom.callbacks import CSVLogger
from tests.callbacks.scripted import Scripted, at, feed, mean_step, raising, run
from tests.models import compiled, fit, functional
from tests.numbers import ones

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class NullModel:
    stop_training = False


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.csv"


def written(path, logs, first=0, **options):
    """Feeds the logs of epochs to a logger; returns the rows in its file."""
    feed(CSVLogger(path, **options), logs, NullModel(), first)
    return rows(path)


def rows(path, **options):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, **options))


def test_csv_logger_holds_the_history_at_any_time(tmp_path):
    path, seen = tmp_path / "deep" / "log.csv", []
    note = at("on_epoch_end", lambda epoch, logs: seen.append(rows(path)))
    history = run(Scripted([0.1, 1 / 3, 1e-30]), CSVLogger(path), note)
    header, *values = rows(path)
    assert header == ["epoch", "loss"]
    assert [(int(epoch), float(loss)) for epoch, loss in values] == list(enumerate(history["loss"]))
    assert seen == [[header, *values[:count]] for count in (1, 2, 3)]


def test_csv_logger_adds_a_column_for_a_new_name(path):
    logs = [{"loss": 3.0}, {"loss": 2.0, "val_loss": 5.0}, {"loss": 1.0, "lr": 0.5}]
    assert written(path, logs) == [
        ["epoch", "loss", "val_loss", "lr"],
        ["0", "3.0", "NA", "NA"],
        ["1", "2.0", "5.0", "NA"],
        ["2", "1.0", "NA", "0.5"],
    ]
    assert [each.name for each in path.parent.iterdir()] == ["log.csv"]


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.floats(allow_nan=False)), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_csv_logger_loses_no_value(tmp_path_factory, logs):
    header, *lines = written(tmp_path_factory.mktemp("csv") / "log.csv", logs)
    found = [dict(zip(header, line, strict=True)) for line in lines]
    assert [int(row.pop("epoch")) for row in found] == list(range(len(logs)))
    assert [{name: float(value) for name, value in row.items() if value != "NA"} for row in found] == logs


def test_csv_logger_replaces_an_existing_file(path):
    written(path, [{"loss": 3.0}, {"loss": 2.0}])
    assert written(path, [{"error": 1.0}]) == [["epoch", "error"], ["0", "1.0"]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, [["epoch", "error", "new", "loss"]]),
        ("", [["epoch", "error", "new", "loss"]]),
        ("epoch,loss,error\n0,3.0,4.0\n", [["epoch", "loss", "error", "new"], ["0", "3.0", "4.0", "NA"]]),
        # A crash has cut off the last row.
        (
            "epoch,loss,error\n0,3.0,4.0\n1,2.",
            [["epoch", "loss", "error", "new"], ["0", "3.0", "4.0", "NA"], ["1", "2.", "NA", "NA"]],
        ),
    ],
)
def test_csv_logger_appends_to_an_existing_file_under_its_columns(path, content, expected):
    if content is not None:
        path.write_text(content, encoding="utf-8")
    new = {"epoch": "2", "error": "1.0", "new": "7.0", "loss": "2.0"}
    logs = [{"error": 1.0, "new": 7.0, "loss": 2.0}]
    assert written(path, logs, first=2, append=True) == [*expected, [new[name] for name in expected[0]]]


def test_csv_logger_appends_several_runs(path):
    logger = CSVLogger(path, append=True)
    for _ in range(2):
        run(Scripted([1, 2]), logger)
    assert [row[0] for row in rows(path)] == ["epoch", "0", "1", "0", "1"]


def test_csv_logger_writes_values_of_all_kinds(path):
    logs = {
        "array": np.array([1.0, 2.5]),
        "table": np.array([[1, 2], [3, 4]]),
        "zero": np.array(0.5),
        "integer": np.int64(7),
        "single": np.float32(0.1),
        "word": 'warm, "still"\nwarmer',
        "nan": np.nan,
    }
    [header, values] = written(path, [logs])
    read = dict(zip(header, values, strict=True))
    assert json.loads(read["array"]) == [1.0, 2.5]
    assert json.loads(read["table"]) == [[1, 2], [3, 4]]
    assert (read["zero"], read["integer"], read["word"], read["nan"]) == ("0.5", "7", logs["word"], "nan")
    assert np.float32(read["single"]) == logs["single"]


def test_csv_logger_takes_another_separator(path):
    feed(CSVLogger(str(path), separator=";"), [{"a": 1.0}, {"a": 2.0, "b": 3.0}], NullModel())
    assert rows(path, delimiter=";") == [["epoch", "a", "b"], ["0", "1.0", "NA"], ["1", "2.0", "3.0"]]


def test_csv_logger_writes_validation_and_values_of_other_callbacks(path):
    add, x = at("on_epoch_end", lambda epoch, logs: logs.update(extra=epoch)), ones(4)
    hl.fit(mean_step, x, epochs=2, validate=(mean_step, 2 * x), callbacks=[add, CSVLogger(path)], verbose=0)
    assert rows(path) == [["epoch", "mean", "val_mean", "extra"], *[[str(n), "1.0", "2.0", str(n)] for n in (0, 1)]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_csv_logger_can_be_used_again_after_an_error(path, error, eagerly):
    x, model, logger = ones(4, 1), compiled(functional(inputs=1)), CSVLogger(path)
    with pytest.raises(error):
        fit(model, x, x, epochs=3, callbacks=[logger, raising(error, "on_epoch_begin", 1)])
    assert [row[0] for row in rows(path)] == ["epoch", "0"]
    fit(model, x, x, epochs=2, callbacks=[logger])
    assert [row[0] for row in rows(path)] == ["epoch", "0", "1"]


def test_csv_logger_that_cannot_write_is_an_error_before_training(path):
    model = Scripted([1])
    path.mkdir()
    with pytest.raises(OSError, match=r"log\.csv"):
        run(model, CSVLogger(path))
    assert float(model.count) == 0
