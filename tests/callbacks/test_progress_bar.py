"""`ProgressBar` and `EpochLines`: the output of a run for people."""

import io
import re

import numpy as np
import pytest
from keras import ops
from rich.console import Console

import handloom as hl
from handloom.callbacks import EpochLines, Event, ProgressBar
from tests.callbacks.scripted import mean_step, raising
from tests.models import compiled, functional
from tests.numbers import ones

X = np.arange(8, dtype="float32")  # In batches of 2: four steps an epoch.


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)


def frames(console):
    """The line of the bar after each refresh."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [re.sub(r"[━╸╺]+ +", "| ", line).strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def run(*callbacks, data=X, **options):
    hl.fit(mean_step, hl.Feed(data, batch_size=2), callbacks=callbacks, **({"verbose": 0} | options))


def read(reader, *later, epochs=2, steps=4, resumed=None, begin=(0, 0, 0)):
    """Passes events to a reader: tuples of kind, epoch, step, batch, seconds and values."""
    data = {"activity": "fit", "epochs": epochs, "steps": steps, "resumed": resumed}
    reader.read(Event("run_begin", *begin, 100.0, 0.0, data))
    for kind, epoch, count, batch, seconds, values in later:
        reader.read(Event(kind, epoch, count, batch, 100.0 + seconds, 0.0, {"values": values, "steps": steps}))


def test_progress_bar_shows_epoch_steps_and_values(console):
    run(ProgressBar(console), epochs=2)
    last = [frame for frame in frames(console) if frame.startswith("Epoch 2/2")][-1]
    assert "4/4" in last
    assert last.endswith("mean 3.5000")
    assert any(frame.startswith("Epoch 1/2") and "4/4" in frame for frame in frames(console))


def test_progress_bar_shows_speed_and_time_left(console):
    bar = ProgressBar(console)
    first, later = ("progress", 0, 1, 1, 60.0, {}), ("progress", 0, 3, 3, 61.0, {"loss": 1.0})
    read(bar, first, later, ("epoch", 1, 4, 0, 62.0, {"loss": 1.0}), ("epoch", 2, 8, 0, 65.0, {}))
    lines = list(dict.fromkeys(re.sub(" +", " ", frame) for frame in frames(console)))
    assert lines == [
        "Epoch 1/2 | 1/4",  # The first step was compiled.
        "Epoch 1/2 | 3/4 2 steps/s, 2s left loss 1.0000",
        "Epoch 1/2 | 4/4 1m02s loss 1.0000",
        "Epoch 2/2 | 4/4 3s",
    ]
    begun = ("progress", 9, 38, 2, 1.0, {})
    read(ProgressBar(console), begun, ("progress", 9, 39, 3, 2.0, {}), epochs=10, begin=(9, 36, 0))
    assert frames(console)[-1] == "Epoch 10/10 | 3/4 1 steps/s, 1s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59, "59s"), (61, "1m01s"), (59.9, "1m00s"), (3599.9, "1h00m"), (7384, "2h03m")]
)
def test_progress_bar_shows_short_durations(console, seconds, text):
    first, later = ("progress", 0, 1, 1, 5, {}), ("progress", 0, 2, 2, 5 + seconds, {})
    read(ProgressBar(console), first, later, epochs=1, steps=3)
    assert f", {text} left" in frames(console)[-1]


def test_progress_bar_shows_no_time_left_where_the_length_is_unknown(console):
    read(ProgressBar(console), *(("progress", 0, step, step, step, {}) for step in (1, 3)), steps=None)
    assert frames(console)[-1].endswith(" 1 steps/s")


def test_progress_bar_is_refreshed_ten_times_a_second_and_reads_no_values_between(reads, console):
    run(ProgressBar(console), reads, data=np.arange(2000, dtype="float32"))
    assert sum(reads.before_step) < 200


def test_progress_bar_shows_evaluation_and_prediction(console):
    model, x = compiled(functional()), ones(8, 3)
    options = {"batch_size": 2, "callbacks": [ProgressBar(console)], "verbose": 0}
    model.evaluate(x, x[:, 0], **options)
    assert re.match(r"Evaluating \| 4/4 .*loss \d", frames(console)[-1])
    model.predict(x, **options)
    assert frames(console)[-1].startswith("Predicting | 4/4")


def test_progress_bar_shows_no_bar_for_validation_within_a_run(console):
    run(ProgressBar(console), validate=(mean_step, X))
    assert not any("Evaluating" in frame for frame in frames(console))
    assert frames(console)[-1].endswith("mean 3.5000  val_mean 3.5000")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_progress_bar_is_removed_after_an_error(console, error):
    bar = ProgressBar(console)
    with pytest.raises(error):
        run(bar, raising(error, "on_train_batch_end", 3))
    assert bar._bar is None
    assert console.file.getvalue().endswith("\x1b[?25h") or "\x1b[?25l" not in console.file.getvalue()


RESUMED = {
    "directory": "run/checkpoints",
    "variables": 12,
    "things": ["the data", "History"],
    "missing": ["callbacks.Mine"],
    "unused": ["state.old"],
    "differences": ["keras 3.14 -> 3.15"],
    "reread": "the generator",
}
LINES = [
    "Resuming from run/checkpoints at step 120 (epoch 3, batch 4).",
    "  Restored 12 variables and the state of the data, History.",
    "  Not in the checkpoint; initialized from scratch: callbacks.Mine.",
    "  Only in the checkpoint; ignored: state.old.",
    "  Changed since the checkpoint; results will not be bitwise identical: keras 3.14 -> 3.15.",
    "  the generator has no position; it is read again up to this batch, in its present order.",
]


def test_progress_bar_and_epoch_lines_print_where_a_run_resumes_and_the_differences(console, capsys):
    read(EpochLines(), resumed=RESUMED, begin=(2, 120, 4))
    assert capsys.readouterr().out.splitlines() == LINES
    read(ProgressBar(console), resumed=RESUMED, begin=(2, 120, 4))
    assert console.file.getvalue().splitlines() == LINES


def test_epoch_lines_print_a_line_an_epoch(capsys):
    read(EpochLines(), ("epoch", 1, 4, 0, 1.2, {"a": 3.5}), ("epoch", 2, 8, 0, 63, {"a": 3.5, "val_a": 0.25}))
    assert capsys.readouterr().out == "Epoch 1/2  1s  a 3.5000\nEpoch 2/2  1m02s  a 3.5000  val_a 0.2500\n"


def test_epoch_lines_print_an_evaluation(capsys):
    compiled(functional()).evaluate(ones(8, 3), ones(8), verbose=2)
    assert re.fullmatch(r"Evaluated  loss \d+\.\d{4}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (1e-5, "1e-05"),
        (0.0, "0.0000"),
        (12.345678, "12.346"),
        (1417.803, "1417.8"),
        (12345.6789, "12346"),
        (-1234567.8, "-1234568"),
        (-0.5, "-0.5000"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("warm", "warm"),
        (np.array([0.5, 0.25]), "[0.5  0.25]"),
        (np.arange(100.0), "[ 0.  1.  2. ... 97. 98. 99.]"),
    ],
)
def test_epoch_lines_show_values_with_five_digits(capsys, value, shown):
    read(EpochLines(), ("epoch", 1, 4, 0, 0, {"value": value}))
    assert capsys.readouterr().out.rstrip().endswith(f"value {shown}")


@pytest.mark.parametrize(("verbose", "lines"), [(0, 0), (2, 2), ("auto", 2)])
def test_fit_verbose_chooses_the_display(capsys, verbose, lines):
    run(epochs=2, verbose=verbose)
    assert capsys.readouterr().out.count("Epoch") == lines


def test_progress_bar_wraps_values_that_are_wider_than_the_terminal():
    file = io.StringIO()
    names = [f"a_rather_long_name_{index}" for index in range(4)]
    step = lambda x: dict.fromkeys(names, ops.mean(x))  # noqa: E731
    hl.fit(step, [ones(2)], callbacks=[ProgressBar(Console(file=file, width=80, force_terminal=True))], verbose=0)
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue()).replace("\n", "").replace(" ", "")
    assert all(f"{name}1.0000" in last for name in names)


@pytest.mark.parametrize("verbose", [3, "loud", None, -1])
def test_fit_verbose_takes_nothing_else(verbose):
    with pytest.raises(ValueError, match=r"verbose takes 0, .*HL750"):
        run(verbose=verbose)
