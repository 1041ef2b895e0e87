"""What a person sees while training runs."""

import io
import re
import sys
import types

import keras
import numpy as np
import pytest
from keras import layers, ops
from rich.console import Console

import handloom as hl
from handloom.callbacks import EpochLines, ProgressBar, _display

X = np.arange(8, dtype="float32")  # In batches of 2: four steps an epoch.


def step(x):
    return {"mean": ops.mean(x)}


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved on."""
    made = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(_display, "time", types.SimpleNamespace(perf_counter=lambda: made.now))
    return made


def frames(console):
    """What stood in the line of the bar, one refresh after the other."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [re.sub(r"[━╸╺]+ +", "| ", line).strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def run(*callbacks, data=X, step=step, **options):
    hl.fit(step, hl.Feed(data, batch_size=2), callbacks=callbacks, verbose=0, **options)


def model():
    made = hl.Model([layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


class Unread(dict):
    """Logs that nobody may look at."""

    def items(self):
        raise AssertionError("The logs were read.")

    __iter__ = keys = values = __getitem__ = get = items


def begun(bar, steps=4, epochs=2):
    bar.set_params({"epochs": epochs, "steps": steps, "verbose": 1})
    bar.on_train_begin()
    bar.on_epoch_begin(0)
    return bar


# --------------------------------------------------------------------------- the bar


def test_the_bar_shows_epoch_steps_and_values(console):
    run(ProgressBar(console), epochs=2)
    last = [frame for frame in frames(console) if frame.startswith("Epoch 2/2")][-1]
    assert "4/4" in last
    assert "steps/s" in last
    assert last.endswith("mean 3.5000")
    assert any(frame.startswith("Epoch 1/2") and "4/4" in frame for frame in frames(console))


def test_the_bar_shows_speed_and_time_left(console, clock):
    bar = begun(ProgressBar(console))
    for batch in range(4):
        clock.now += 0.5
        bar.on_train_batch_end(batch, {"loss": 1.0})
    assert frames(console)[-1] == "Epoch 1/2 | 4/4 2 steps/s, 2s left loss 1.0000"
    bar.on_epoch_end(0, {"loss": 1.0})
    bar.on_epoch_begin(1)
    clock.now += 2.0
    bar.on_train_batch_end(0, {"loss": 0.5})
    assert frames(console)[-1] == "Epoch 2/2 | 1/4 1.2 steps/s, 2s left loss 0.5000"
    bar.close()


def test_the_time_left_counts_from_the_epoch_that_training_begins_at(console, clock):
    bar = ProgressBar(console)
    bar.set_params({"epochs": 10, "steps": 4, "verbose": 1})
    bar.on_train_begin()
    bar.on_epoch_begin(9)
    clock.now += 1.0
    bar.on_train_batch_end(0, {})
    assert frames(console)[-1] == "Epoch 10/10 | 1/4 1 steps/s, 3s left"
    bar.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59, "59s"), (61, "1m01s"), (59.9, "1m00s"), (3599.9, "1h00m"), (7384, "2h03m")]
)
def test_durations_are_short(console, clock, seconds, text):
    bar = begun(ProgressBar(console), steps=2, epochs=1)
    clock.now += seconds
    bar.on_train_batch_end(0, {})
    assert f", {text} left" in frames(console)[-1]
    bar.close()


def test_the_time_left_is_not_shown_where_the_length_is_unknown(console):
    hl.fit(step, lambda: iter([X, X]), callbacks=[ProgressBar(console)], verbose=0)
    assert "2/?" in frames(console)[-1]
    assert "steps/s" in frames(console)[-1]
    assert "left" not in frames(console)[-1]


def test_the_bar_does_not_look_at_the_logs_between_refreshes(console, clock):
    bar = begun(ProgressBar(console), steps=100)
    bar.on_train_batch_end(0, {"loss": 1.0})
    shown = console.file.getvalue()
    for batch in range(1, 50):
        clock.now += 0.001
        bar.on_train_batch_end(batch, Unread(loss=1.0))
    assert console.file.getvalue() == shown
    clock.now += 0.1
    with pytest.raises(AssertionError, match="The logs were read"):
        bar.on_train_batch_end(50, Unread(loss=1.0))
    bar.on_train_batch_end(50, {"loss": 2.0})
    assert "51/100" in frames(console)[-1]
    assert "loss 2.0000" in frames(console)[-1]
    bar.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (1e-5, "1e-05"),
        (0.0, "0.0000"),
        (12345.6789, "12345.6789"),
        (-0.5, "-0.5000"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("warm", "warm"),
        (np.array([0.5, 0.25]), "[0.5  0.25]"),
        (np.arange(100.0), "[ 0.  1.  2. ... 97. 98. 99.]"),
    ],
)
def test_values_are_shown_with_four_digits(console, value, text):
    bar = begun(ProgressBar(console))
    bar.on_train_batch_end(0, {"loss": value})
    assert frames(console)[-1].endswith(f"loss {text}")
    bar.close()


def test_the_line_of_an_epoch_ends_with_its_results_and_those_of_validation(console):
    run(ProgressBar(console), validate=(step, 10 * X))
    assert frames(console)[-1].endswith("mean 3.5000  val_mean 35.0000")


def test_each_epoch_leaves_its_line(console):
    run(ProgressBar(console), epochs=3)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).split("\n")
    finished = [line.split("\r")[-1] for line in lines if line.strip()]
    assert [line.split()[1] for line in finished] == ["1/3", "2/3", "3/3"]


def test_evaluation_has_a_bar_of_its_own(console):
    model().evaluate(X[:, None], X, batch_size=2, callbacks=[ProgressBar(console)], verbose=0)
    assert frames(console)[-1].startswith("Evaluating | 4/4")
    assert "loss" in frames(console)[-1]


def test_prediction_has_a_bar_of_its_own_without_values(console):
    model().predict(X[:, None], batch_size=2, callbacks=[ProgressBar(console)], verbose=0)
    assert re.fullmatch(r"Predicting \| 4/4 \S+ steps/s, 0s left", frames(console)[-1])


def test_validation_within_training_has_no_bar(console):
    run(ProgressBar(console), validate=(step, X))
    assert not any("Evaluating" in frame for frame in frames(console))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_bar_is_taken_down_after_an_exception(console, error):
    def fail(batch, logs):
        if batch == 2:
            raise error

    bar, output = ProgressBar(console), sys.stdout
    with pytest.raises(error):
        run(bar, keras.callbacks.LambdaCallback(on_train_batch_end=fail))
    assert sys.stdout is output  # Which rich redirects while a bar is up.
    assert console.file.getvalue().endswith("\x1b[?25h")  # The cursor is shown again.
    run(bar)
    assert "4/4" in frames(console)[-1]


def test_a_bar_used_again_after_an_exception_shows_an_evaluation(console):
    def fail(batch, logs):
        raise RuntimeError

    bar = ProgressBar(console)
    with pytest.raises(RuntimeError):
        run(bar, keras.callbacks.LambdaCallback(on_train_batch_end=fail))
    model().evaluate(X[:, None], X, callbacks=[bar], verbose=0)
    assert frames(console)[-1].startswith("Evaluating | 1/1")


def test_what_is_printed_meanwhile_stays_above_the_bar(console):
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: print(f"seen {batch}"))
    run(ProgressBar(console), note)
    assert [frame for frame in frames(console) if frame.startswith("seen")] == [f"seen {batch}" for batch in range(4)]
    assert "4/4" in frames(console)[-1]


# --------------------------------------------------------------------------- a line an epoch


def test_a_line_an_epoch_holds_epoch_duration_and_values(capsys, clock):
    lines = EpochLines()
    lines.set_params({"epochs": 2})
    lines.on_train_begin()
    for epoch, seconds in enumerate((3.0, 75.0)):
        lines.on_epoch_begin(epoch)
        clock.now += seconds
        lines.on_epoch_end(epoch, {"loss": 0.25, "val_loss": 1e-4})
    assert capsys.readouterr().out == (
        "Epoch 1/2  3s  loss 0.2500  val_loss 0.0001\nEpoch 2/2  1m15s  loss 0.2500  val_loss 0.0001\n"
    )


def test_a_line_for_an_evaluation_but_none_for_validation(capsys):
    lines = EpochLines()
    made = hl.Model([layers.Dense(1, kernel_initializer="zeros")])
    made.compile(keras.optimizers.SGD(0.0), "mae")
    made.fit(X[:, None], X, validation_data=(X[:, None], X), callbacks=[lines], verbose=0)
    assert re.fullmatch(r"Epoch 1/1  \d+s  loss 3\.5000  val_loss 3\.5000\n", capsys.readouterr().out)
    made.evaluate(X[:, None], X, callbacks=[lines], verbose=0)
    assert capsys.readouterr().out == "Evaluated  loss 3.5000\n"


def test_lines_used_again_after_an_exception_tell_of_an_evaluation(capsys):
    def fail(batch, logs):
        raise RuntimeError

    lines = EpochLines()
    with pytest.raises(RuntimeError):
        run(lines, keras.callbacks.LambdaCallback(on_train_batch_end=fail))
    model().evaluate(X[:, None], X, callbacks=[lines], verbose=0)
    assert capsys.readouterr().out.startswith("Evaluated  loss ")


# --------------------------------------------------------------------------- verbose


@pytest.fixture
def shown(capsys, monkeypatch):
    """What fitting writes to standard output, which is no terminal of whatever kind the tests run in."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def fit(verbose):
        hl.fit(step, X, verbose=verbose)
        return capsys.readouterr().out

    return fit


def test_verbose_0_is_silence(shown, capsys):
    assert shown(0) == ""
    made = model()
    made.fit(X[:, None], X, verbose=0)
    made.evaluate(X[:, None], X, verbose=0)
    made.predict(X[:, None], verbose=0)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_verbose_1_is_a_bar(shown):
    assert re.search(r"Epoch 1/1 ━+ 1/1 .* steps/s, 0s left mean 3.5000", shown(1))


def test_verbose_2_is_a_line_an_epoch(shown):
    assert re.fullmatch(r"Epoch 1/1  \d+s  mean 3.5000\n", shown(2))


def test_verbose_auto_is_lines_where_there_is_no_terminal(shown):
    assert re.fullmatch(r"Epoch 1/1  \d+s  mean 3.5000\n", shown("auto"))


def test_verbose_auto_is_a_bar_in_a_terminal(shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # Has rich take any output for a terminal.
    monkeypatch.setenv("TERM", "xterm")
    assert "━" in shown("auto")


@pytest.mark.parametrize("verbose", [3, -1, "loud", "1", None])
def test_another_verbose_is_refused(verbose):
    with pytest.raises(
        ValueError, match=r'verbose takes 0 \(silent\), 1 \(bar\), 2 \(a line an epoch\) or "auto"; received'
    ):
        hl.fit(step, X, verbose=verbose)
    with pytest.raises(ValueError, match="verbose takes 0"):
        model().evaluate(X[:, None], X, verbose=verbose)
