"""JSONLogger: the events of a run as lines that programs read, and read_events, which reads them."""

import errno
import json
import math

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.callbacks import JSONLogger, _json_logger
from handloom.errors import HandloomWarning
from handloom.report import read_events

X = np.arange(10, dtype="float32")  # In batches of 2: five steps an epoch.


def step(x):
    return {"mean": ops.mean(x)}


def run(*callbacks, step=step, epochs=1, **options):
    hl.fit(step, hl.Feed(X, batch_size=2), epochs=epochs, callbacks=callbacks, verbose=0, **options)


def where(path, kind):
    return [(event.epoch, event.step, event.batch) for event in read_events(path) if event.kind == kind]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "events.jsonl"


def test_json_logger_writes_each_event_with_its_place_and_time(path):
    run(JSONLogger(str(path)), epochs=2, validate=(step, 10 * X))
    events = read_events(path)
    kinds = [event.kind for event in events if event.kind != "trace"]
    assert kinds == ["run_begin", "validation", "epoch", "validation", "epoch", "run_end"]
    assert events[0].data == {"version": 1, "activity": "fit", "epochs": 2, "steps": 5, "resumed": None}
    assert where(path, "epoch") == [(1, 5, 0), (2, 10, 0)]
    assert [event.values for event in events if event.kind == "validation"] == [{"mean": 45}, {"mean": 45}]
    assert [dict(event.values) for event in events if event.kind == "epoch"] == [{"mean": 4.5, "val_mean": 45}] * 2
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)
    traces = [event.data for event in events if event.kind == "trace"]
    assert [trace["signature"] for trace in traces] == ["x: float32[2]", "x: float32[10]"]
    assert all(trace["compiled"] and trace["duration"] > 0 for trace in traces)
    assert (events[-1].values, events[-1].data["error"]) == ({"mean": 4.5, "val_mean": 45}, None)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (None, []),
        (hl.every(epochs=1), []),
        (hl.every(steps=2), [(0, 2, 2), (0, 4, 4), (1, 6, 1), (1, 8, 3), (1, 10, 5)]),
        (hl.every(steps=100), []),
        (hl.every(seconds=1e-9), [(index // 5, index + 1, index % 5 + 1) for index in range(10)]),
    ],
    ids=repr,
)
def test_json_logger_writes_progress_when_its_every_says_so(path, every, expected):
    run(JSONLogger(path, every), epochs=2)
    assert where(path, "progress") == expected


def test_progress_holds_the_values_so_far(path):
    run(JSONLogger(path, hl.every(steps=2)), epochs=2)
    values = {event.step: event.values["mean"] for event in read_events(path) if event.kind == "progress"}
    assert (values[2], values[4], values[6]) == (X[:4].mean(), X[:8].mean(), X[:2].mean())


def test_values_of_any_kind_are_json_and_numbers_again_when_read(path):
    def add(epoch, logs):
        logs |= {"table": np.array([[1.0, np.nan], [np.inf, 2.0]]), "number": np.array(0.5), "integer": np.int64(7)}
        logs |= {"note": "warm", "low": -np.inf}

    run(keras.callbacks.LambdaCallback(on_epoch_end=add), JSONLogger(path))

    def refuse(constant):
        raise ValueError(f"JSON has no {constant}.")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    [values] = [event.values for event in read_events(path) if event.kind == "epoch"]
    assert math.isnan(values["table"][0][1])
    assert values["table"][1] == [math.inf, 2]
    assert (values["number"], values["integer"], values["note"], values["low"]) == (0.5, 7, "warm", -math.inf)


def test_findings_are_events(path):
    with hl.checks.collect():
        hl.fit(lambda x, sample_weight: {}, (X, X + 1), callbacks=[JSONLogger(path)], verbose=0)
    [finding] = [event.data for event in read_events(path) if event.kind == "finding"]
    assert finding["filename"] == __file__
    assert "does not use the sample weights" in finding["saw"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_ends_the_events_with_its_name(path, error):
    def fail(epoch, logs):
        raise error("stop here")

    with pytest.raises(error):
        run(JSONLogger(path), keras.callbacks.LambdaCallback(on_epoch_end=fail))
    assert read_events(path)[-1].data["error"] == {"type": error.__name__, "message": "stop here", "finding": None}


def test_events_can_be_read_while_a_run_goes_on_and_a_line_cut_off_is_left_out(path):
    counts = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(where(path, "epoch"))))
    run(JSONLogger(path), note, epochs=3)
    assert counts == [0, 1, 2]
    text = path.read_text()
    path.write_text(text[:-20])
    assert read_events(path)[-1].kind == "epoch"
    path.write_text(text[20:])
    with pytest.warns(HandloomWarning, match="Line 1 of .* is not JSON"):
        assert read_events(path)[0].kind == "trace"


def test_a_run_that_begins_anew_supersedes_what_the_file_holds(path):
    for _ in range(2):
        run(JSONLogger(path))
    assert where(path, "epoch") == [(1, 5, 0)]
    assert len([event for event in read_events(path, superseded=True) if event.kind == "epoch"]) == 2


def test_read_events_leaves_out_what_a_resumed_run_took_again(tmp_path):
    total = keras.Variable(0.0)

    def fails_at(step):
        def fail(batch, logs):
            if len(seen) == step:
                raise RuntimeError
            seen.append(batch)

        seen = []
        return keras.callbacks.LambdaCallback(on_train_batch_end=fail)

    def counted(x):
        total.assign(total + 1)
        return {"total": total.value * 1}

    options = {"state": {"total": total}, "run_dir": tmp_path, "save": hl.every(steps=3), "epochs": 3}
    with pytest.raises(RuntimeError):
        run(fails_at(7), step=counted, **options)
    run(step=counted, **options)
    assert where(tmp_path, "epoch") == [(1, 5, 0), (2, 10, 0), (3, 15, 0)]
    [first, resumed] = [event for event in read_events(tmp_path) if event.kind == "run_begin"]
    assert (first.data["resumed"], resumed.step, resumed.epoch, resumed.batch) == (None, 6, 1, 1)
    assert resumed.seconds >= first.seconds
    assert [event.kind for event in read_events(tmp_path)].count("run_end") == 1
    assert [event.kind for event in read_events(tmp_path, superseded=True)].count("run_end") == 2


def test_event_readers_refuse_a_fit_that_has_no_events(path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="JSONLogger reads the events of a run of Handloom"):
        model.fit(X[:, None], X, callbacks=[JSONLogger(path)], verbose=0)


def test_json_logger_takes_a_time():
    with pytest.raises(TypeError, match=r"every takes hl.every\(steps=100\), or None; received 5"):
        JSONLogger("log", every=5)


class FullDisk:
    """A file that takes so many more bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, line):
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        line = line[: self._room]
        self._room -= len(line)
        return self._file.write(line)

    def close(self):
        self._file.close()


def test_json_logger_on_a_full_disk_warns_once_and_training_goes_on(path, monkeypatch):
    opened = _json_logger._opened
    monkeypatch.setattr(_json_logger, "_opened", lambda path: FullDisk(opened(path), 300))
    with pytest.warns(HandloomWarning, match="No space left on device.*Training goes on") as warned:
        run(JSONLogger(path), epochs=2)
    assert len(warned) == 1
    monkeypatch.undo()
    run(JSONLogger(path))
    with pytest.warns(HandloomWarning, match=r"Line 2 of .* is not JSON"):
        events = read_events(path, superseded=True)
    assert [event.kind for event in events if event.kind != "trace"] == ["run_begin", "run_begin", "epoch", "run_end"]
