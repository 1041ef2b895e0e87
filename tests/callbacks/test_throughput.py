"""`Throughput` reports the speed of training."""

import time

import keras
import numpy as np
import pytest

import handloom as hl
from handloom.callbacks import Throughput
from handloom.callbacks import _throughput as module
from tests.callbacks.scripted import at, mean_step
from tests.models import compiled, fit, sequential

X = np.zeros((8, 1), dtype="float32")


def speeds(*callbacks, data=None, **options):
    """The history of a run of a plain step."""
    feed = hl.Feed(X, batch_size=3) if data is None else data
    return hl.fit(mean_step, feed, callbacks=[Throughput(), *callbacks], verbose=0, **options).history


class Clock:
    """A clock that advances only in `sleep`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def slow(clock, seconds, examples=(3, 3, 2)):
    """A source that takes so long for each batch."""

    def batches():
        for count in examples:
            clock.sleep(seconds)
            yield X[:count]

    return hl.Feed(batches)


def busy(clock, seconds):
    """Makes each step take so long."""
    return at("on_train_batch_begin", lambda batch, logs: clock.sleep(seconds))


def test_throughput_reports_shares_of_the_elapsed_time(clock, eagerly):
    history = speeds(busy(clock, 3.0), data=slow(clock, 1.0), epochs=3)
    # The first epoch also compiles, which takes time by the real clock.
    assert history["steps_per_second"][1:] == [3 / 12] * 2
    assert history["examples_per_second"][1:] == [8 / 12] * 2
    assert history["data_wait"][1:] == [3 / 12] * 2


@pytest.mark.parametrize("when", [hl.every(epochs=1), hl.every(steps=1)], ids=["at the end", "after each step"])
@pytest.mark.parametrize("kind", ["pair", "function"])
def test_throughput_does_not_count_validation(clock, when, kind):
    def by_hand():
        clock.sleep(100.0)
        return {"loss": 1.0}

    validate = by_hand if kind == "function" else (mean_step, slow(clock, 50.0))
    history = speeds(busy(clock, 3.0), data=slow(clock, 1.0), epochs=2, validate=validate, validate_every=when)
    assert history["steps_per_second"][1] == 3 / 12
    assert history["data_wait"][1] == 3 / 12


def test_throughput_does_not_count_compilation():
    def slow_to_trace(x):
        time.sleep(0.5)
        return mean_step(x)

    took = time.perf_counter()
    history = hl.fit(slow_to_trace, hl.Feed(X, batch_size=1), callbacks=[Throughput()], verbose=0).history
    assert time.perf_counter() - took > 0.5
    assert history["steps_per_second"][0] > 8 / 0.5


def test_throughput_counts_the_examples_of_unequal_batches(clock):
    history = speeds(busy(clock, 1.0), data=slow(clock, 0.0, examples=(5, 1)), epochs=2)
    assert history["examples_per_second"][1] == 3.0


def test_throughput_shows_its_values_to_later_callbacks_and_does_not_wait_for_the_device(reads):
    seen = []
    speeds(at("on_epoch_end", lambda epoch, logs: seen.append(set(logs))), reads, epochs=1)
    assert seen == [{"mean", "steps_per_second", "examples_per_second", "data_wait"}]
    assert reads.before_step == [False, False, False]


def test_throughput_counts_steps_in_the_fit_of_keras():
    model = compiled(sequential(inputs=1, cls=keras.Sequential))
    assert set(fit(model, X, X, callbacks=[Throughput()])) == {"loss", "steps_per_second", "data_wait"}


def test_throughput_does_nothing_in_an_evaluation():
    model = compiled(sequential(inputs=1))
    assert set(model.evaluate(X, X, callbacks=[Throughput()], return_dict=True, verbose=0)) == {"loss"}
