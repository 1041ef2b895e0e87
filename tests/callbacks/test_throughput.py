"""How fast it goes."""

import time

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.callbacks import Throughput
from handloom.callbacks import _throughput as module

X = np.zeros((8, 1), dtype="float32")


def step(x):
    return {"loss": ops.mean(x)}


def fit(*callbacks, data=None, **options):
    feed = hl.Feed(X, batch_size=3) if data is None else data
    return hl.fit(step, feed, callbacks=[Throughput(), *callbacks], verbose=0, **options).history


class Clock:
    """Time that passes when told to."""

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
    """A source that takes its time over each batch."""

    def batches():
        for count in examples:
            clock.sleep(seconds)
            yield X[:count]

    return hl.Feed(batches)


def busy(clock, seconds):
    """As if each step took so long."""
    return keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: clock.sleep(seconds))


def test_speed_and_waiting_are_shares_of_the_time_that_passed(clock, eagerly):
    history = fit(busy(clock, 3.0), data=slow(clock, 1.0), epochs=3)
    # The first epoch also compiles, by a clock that is not this one.
    assert history["steps_per_second"][1:] == [3 / 12] * 2
    assert history["examples_per_second"][1:] == [8 / 12] * 2
    assert history["data_wait"][1:] == [3 / 12] * 2


@pytest.mark.parametrize("when", [hl.every(epochs=1), hl.every(steps=1)], ids=["at the end", "after each step"])
@pytest.mark.parametrize("kind", ["pair", "function"])
def test_validation_does_not_count(clock, when, kind):
    def by_hand():
        clock.sleep(100.0)
        return {"loss": 1.0}

    validate = by_hand if kind == "function" else (step, slow(clock, 50.0))
    history = fit(busy(clock, 3.0), data=slow(clock, 1.0), epochs=2, validate=validate, validate_every=when)
    assert history["steps_per_second"][1] == 3 / 12
    assert history["data_wait"][1] == 3 / 12


def test_compiling_does_not_count():
    def slow_to_trace(x):
        time.sleep(0.5)
        return step(x)

    took = time.perf_counter()
    history = hl.fit(slow_to_trace, hl.Feed(X, batch_size=1), callbacks=[Throughput()], verbose=0).history
    assert time.perf_counter() - took > 0.5
    assert history["steps_per_second"][0] > 8 / 0.5


def test_steps_of_unequal_length_are_counted_by_example(clock):
    history = fit(busy(clock, 1.0), data=slow(clock, 0.0, examples=(5, 1)), epochs=2)
    assert history["examples_per_second"][1] == 3.0


def test_what_comes_after_it_sees_its_values():
    seen = []
    fit(keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(set(logs))), epochs=1)
    assert seen == [{"loss", "steps_per_second", "examples_per_second", "data_wait"}]


def test_it_does_not_wait_for_the_device(reads):
    fit(reads, epochs=1)
    assert reads.before_step == [False, False, False]


def test_in_keras_s_own_loop_it_counts_steps():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    history = model.fit(X, X, callbacks=[Throughput()], verbose=0).history
    assert set(history) == {"loss", "steps_per_second", "data_wait"}


def test_in_an_evaluation_it_does_nothing():
    model = hl.Model([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert set(model.evaluate(X, X, callbacks=[Throughput()], return_dict=True, verbose=0)) == {"loss"}
