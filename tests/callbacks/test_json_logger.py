"""`JSONLogger` writes the events of a run as JSON lines, which `read_events` reads."""

import errno
import io
import json
import math

import keras
import numpy as np
import pytest
from rich.console import Console

import handloom as hl
from handloom.callbacks import EpochLines, JSONLogger, ProgressBar, TensorBoard, _json_logger
from handloom.errors import HandloomWarning, StepError
from handloom.report import read_events
from tests.callbacks.scripted import at, mean_step, raising
from tests.models import compiled, sequential

X = np.arange(10, dtype="float32")  # In batches of 2: five steps an epoch.


def run(*callbacks, step=mean_step, epochs=1, **options):
    hl.fit(step, hl.Feed(X, batch_size=2), epochs=epochs, callbacks=callbacks, verbose=0, **options)


def of_kind(kind, path, **options):
    return [event for event in read_events(path, **options) if event.kind == kind]


def where(path, kind):
    return [(event.epoch, event.step, event.batch) for event in of_kind(kind, path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "events.jsonl"


def test_json_logger_writes_each_event_with_its_position_and_time(path):
    run(JSONLogger(str(path)), epochs=2, validate=(mean_step, 10 * X))
    events = read_events(path)
    kinds = [event.kind for event in events if event.kind != "trace"]
    assert kinds == ["run_begin", "validation", "epoch", "validation", "epoch", "run_end"]
    assert events[0].data == {"version": 1, "activity": "fit", "epochs": 2, "steps": 5, "resumed": None}
    assert where(path, "epoch") == [(1, 5, 0), (2, 10, 0)]
    assert [event.values for event in of_kind("validation", path)] == [{"mean": 45}, {"mean": 45}]
    assert [dict(event.values) for event in of_kind("epoch", path)] == [{"mean": 4.5, "val_mean": 45}] * 2
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)
    traces = [event.data for event in of_kind("trace", path)]
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
def test_json_logger_writes_the_values_so_far_when_its_every_says_so(path, every, expected):
    run(JSONLogger(path, every), epochs=2)
    assert where(path, "progress") == expected
    for event in of_kind("progress", path):
        assert event.values["mean"] == X[: 2 * event.batch].mean()


def test_json_logger_writes_values_of_any_kind(path):
    def add(epoch, logs):
        logs |= {"table": np.array([[1.0, np.nan], [np.inf, 2.0]]), "number": np.array(0.5), "integer": np.int64(7)}
        logs |= {"note": "warm", "low": -np.inf}

    run(at("on_epoch_end", add), JSONLogger(path))

    def refuse(constant):
        raise ValueError(f"JSON has no {constant}.")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    [values] = [event.values for event in of_kind("epoch", path)]
    assert math.isnan(values["table"][0][1])
    assert values["table"][1] == [math.inf, 2]
    assert (values["number"], values["integer"], values["note"], values["low"]) == (0.5, 7, "warm", -math.inf)


def test_json_logger_writes_findings(path):
    with hl.checks.collect():
        hl.fit(lambda x, sample_weight: {}, (X, X + 1), callbacks=[JSONLogger(path)], verbose=0)
    [finding] = [event.data for event in of_kind("finding", path)]
    assert finding["filename"] == __file__
    assert "does not use the sample weights" in finding["saw"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_json_logger_writes_the_error_that_ends_a_run(path, error):
    with pytest.raises(error):
        run(JSONLogger(path), raising(error("stop here"), "on_epoch_end", 0))
    assert read_events(path)[-1].data["error"] == {"type": error.__name__, "message": "stop here", "finding": None}


def test_read_events_reads_a_run_in_progress_and_leaves_out_incomplete_lines(path):
    counts = []
    note = at("on_epoch_end", lambda epoch, logs: counts.append(len(of_kind("epoch", path))))
    run(JSONLogger(path), note, epochs=3)
    assert counts == [0, 1, 2]
    text = path.read_text()
    path.write_text(text[:-20])
    assert read_events(path)[-1].kind == "epoch"
    path.write_text(text[20:])
    with pytest.warns(HandloomWarning, match="Line 1 of .* is not an event"):
        assert read_events(path)[0].kind == "trace"


def test_read_events_skips_lines_that_are_no_events(path):
    run(JSONLogger(path))
    whole = read_events(path)
    with path.open("ab") as file:
        file.write(b'5\nnull\n{"kind": "epoch"}\n\xff\n')
    with hl.checks.collect() as findings:
        assert read_events(path) == whole
    assert [finding.code for finding in findings] == ["HL950"] * 4


def test_event_readers_read_run_begin_first_though_a_saved_run_compiles_its_step_before(tmp_path):
    for epochs in (1, 2):
        shown = [ProgressBar(Console(file=io.StringIO())), TensorBoard(tmp_path / "board"), EpochLines()]
        run(*shown, run_dir=tmp_path, state={}, epochs=epochs)
    kinds = [event.kind for event in read_events(tmp_path)]
    assert kinds == [*["run_begin", "trace", "epoch", "saved"] * 2, "run_end"]


def test_event_readers_read_nothing_of_a_run_that_fails_before_it_begins(tmp_path):
    lost = keras.Variable(0.0)
    with pytest.raises(StepError, match="HL250"):
        run(step=lambda x: {"lost": lost.value * 1}, run_dir=tmp_path, state={})
    assert not (tmp_path / "events.jsonl").exists()


def test_json_logger_writes_the_last_save_before_the_error_that_ends_a_run(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(at("on_epoch_begin", lambda epoch, logs: 1 // (2 - epoch)), run_dir=tmp_path, state={}, epochs=3)
    assert [event.data["saved_step"] for event in of_kind("saved", tmp_path)] == [5, 10]
    assert read_events(tmp_path)[-1].kind == "run_end"


def test_read_events_leaves_out_a_run_that_another_one_replaced(path):
    for _ in range(2):
        run(JSONLogger(path))
    assert where(path, "epoch") == [(1, 5, 0)]
    assert len(of_kind("epoch", path, superseded=True)) == 2


def test_read_events_leaves_out_steps_that_a_resumed_run_repeated(tmp_path):
    total = keras.Variable(0.0)

    def counted(x):
        total.assign(total + 1)
        return {"total": total.value * 1}

    options = {"state": {"total": total}, "run_dir": tmp_path, "save": hl.every(steps=3), "epochs": 3}
    seen = []
    note = at("on_train_batch_begin", lambda batch, logs: seen.append(batch) if len(seen) < 8 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(note, step=counted, **options)
    run(step=counted, **options)
    assert where(tmp_path, "epoch") == [(1, 5, 0), (2, 10, 0), (3, 15, 0)]
    [first, resumed] = of_kind("run_begin", tmp_path)
    assert (first.data["resumed"], resumed.step, resumed.epoch, resumed.batch) == (None, 6, 1, 1)
    assert resumed.seconds >= first.seconds
    assert len(of_kind("run_end", tmp_path)) == 1
    assert len(of_kind("run_end", tmp_path, superseded=True)) == 2


def test_json_logger_refuses_the_fit_of_keras_which_has_no_events(path):
    model = compiled(sequential(inputs=1, cls=keras.Sequential))
    with pytest.raises(TypeError, match=r"JSONLogger reads the events of a Handloom run.*HL215"):
        model.fit(X[:, None], X, callbacks=[JSONLogger(path)], verbose=0)


def test_json_logger_takes_a_schedule():
    with pytest.raises(TypeError, match=r"every takes hl.every\(steps=100\), or None; received 5"):
        JSONLogger("log", every=5)


class FullDisk:
    """A file that takes only so many more bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room
        self.close = file.close

    def write(self, line):
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        line = line[: self._room]
        self._room -= len(line)
        return self._file.write(line)


def test_json_logger_on_a_full_disk_warns_once_and_training_continues(path, monkeypatch):
    opened = _json_logger._opened
    monkeypatch.setattr(_json_logger, "_opened", lambda path: FullDisk(opened(path), 300))
    with pytest.warns(HandloomWarning, match="No space left on device.*Training continues.*HL711") as warned:
        run(JSONLogger(path), epochs=2)
    assert len(warned) == 1
    monkeypatch.undo()
    run(JSONLogger(path))
    with pytest.warns(HandloomWarning, match=r"Line 2 of .* is not an event"):
        events = read_events(path, superseded=True)
    assert [event.kind for event in events if event.kind != "trace"] == ["run_begin", "run_begin", "epoch", "run_end"]
