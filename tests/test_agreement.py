"""A reported value is the same everywhere: in the history, logs, files and displays, to the last digit they print."""

import csv
import io
import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from rich.console import Console

import handloom as hl
from handloom.callbacks import EpochLines, ProgressBar
from tests.models import built, compiled, fit, functional
from tests.run.run_log import epochs_in

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(2, 70, 1)).astype("float32")
WEIGHT = RANDOM.uniform(0, 3, 70).astype("float32")
NAMES = ["loss", "scalar", "weighted", "pair", "metric", "result", "tiny"]


def values_of_all_kinds():
    """A function of a batch that returns one value of each kind that can be reported."""
    metric, result = keras.metrics.MeanAbsoluteError(name="metric"), keras.metrics.MeanSquaredError(name="result")

    def values(x, y, weight):
        metric.update_state(y, x)
        result.update_state(y, x, sample_weight=weight)
        squares = (x - y)[:, 0] ** 2
        return {
            "scalar": ops.mean(x),
            "weighted": ops.sum(squares * weight) / ops.sum(weight),
            "pair": (ops.sum(squares * weight), ops.sum(weight)),
            "metric": metric,
            "result": result.result(),
            "tiny": 1e-5 * ops.mean(squares),
        }

    return values


class Everything(hl.Model):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.values_of = values_of_all_kinds()

    def train_step(self, data):
        x, y, weight = data
        loss = self.minimize(lambda: self.compute_loss(y=y, y_pred=self(x, training=True), sample_weight=weight))
        return {"loss": loss} | self.values_of(x, y, weight)


def by_model(**options):
    return fit(compiled(functional(inputs=1, cls=Everything)), X, Y, sample_weight=WEIGHT, batch_size=32, **options)


def by_step(**options):
    layer, optimizer, values_of = built(layers.Dense(1), 1), keras.optimizers.SGD(0.1), values_of_all_kinds()

    def step(x, y, sample_weight):
        loss = hl.minimize(lambda: ops.mean((layer(x) - y) ** 2), layer, optimizer)
        return {"loss": loss} | values_of(x, y, sample_weight)

    return hl.fit(step, hl.Feed((X, Y, WEIGHT), batch_size=32), verbose=0, **options).history


class Seen(keras.callbacks.Callback):
    """Keeps the logs at the end of each epoch and after its last batch."""

    def __init__(self):
        super().__init__()
        self.of_batches, self.of_epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            self.of_batches.append({name: logs[name] for name in NAMES})

    def on_epoch_end(self, epoch, logs=None):
        self.of_epochs.append(dict(logs))


def shown_in(text):
    """The numbers after the names, as text, each time that all of them are shown."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [dict(re.findall(r"(\w+) (-?[\d.]+(?:e-?\d+)?)(?=\s|$)", line)) for line in re.split(r"[\r\n]+", text)]
    return [{name: line[name] for name in NAMES} for line in lines if set(NAMES) <= set(line)]


@pytest.mark.parametrize("train", [by_model, by_step])
def test_fit_shows_the_same_values_in_history_callbacks_files_and_displays(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, seen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=240), Seen()
    # EpochLines after the bar has gone, which would otherwise move the lines above itself.
    callbacks = [seen, ProgressBar(terminal), EpochLines(), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    history = train(callbacks=callbacks, epochs=3, run_dir=tmp_path / "run", save=None)

    names = sorted(NAMES) if train is by_model else NAMES  # As Keras sorts those of models.
    assert list(history) == names
    epochs = [dict(zip(names, values, strict=True)) for values in zip(*history.values(), strict=True)]
    assert seen.of_epochs == seen.of_batches == epochs
    assert [{name: line[name] for name in NAMES} for line in epochs_in(tmp_path / "run")] == epochs
    with (tmp_path / "log.csv").open() as file:
        assert [{name: float(row[name]) for name in NAMES} for row in csv.DictReader(file)] == epochs

    printed = [
        {name: f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.4g}" for name, value in epoch.items()}
        for epoch in epochs
    ]
    assert shown_in(capsys.readouterr().out) == printed
    in_the_bar = shown_in(terminal.file.getvalue())
    assert in_the_bar[-1] == printed[-1]
    assert all(epoch in in_the_bar for epoch in printed)


def test_evaluate_returns_the_values_that_its_callbacks_see():
    model = functional(layers.Identity(), inputs=1)
    model.compile(loss="mse", metrics=["mae"], weighted_metrics=["mse"])
    seen, watch = [], keras.callbacks.LambdaCallback()
    watch.on_test_end = lambda logs=None: seen.append(dict(logs))
    options = {"sample_weight": WEIGHT, "batch_size": 32, "callbacks": [watch], "verbose": 0}
    as_dict = model.evaluate(X, Y, return_dict=True, **options)
    as_list = model.evaluate(X, Y, **options)
    assert seen == [as_dict, as_dict]
    assert as_list == list(as_dict.values())
