"""Strategies: a run asks its strategy wherever devices and processes matter, in every way in."""

import functools
import signal

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.distribute import SingleDevice
from handloom.errors import ArgumentError
from handloom.optimizers import ClipByValue, GradientTransforms
from tests.models import compiled, fit, functional
from tests.numbers import close, normal, numpy, ones, same, values_of
from tests.threads import in_a_thread

ASKED = {"place", "shard", "put", "reduce", "sum", "agree", "shards_of"}


class Recording(SingleDevice):
    """Does what a single device does, and records what it is asked, each kind once."""

    def __init__(self):
        self.asked = []
        for name in ASKED:
            setattr(self, name, functools.partial(self._record, name))

    def _record(self, name, *arguments):
        if name not in self.asked:
            self.asked.append(name)
        return getattr(super(), name)(*arguments)


class FirstOfTwo(SingleDevice):
    """The first of two processes, of which the other has the same examples, three times as heavy, and no gradients."""

    rank, size = 0, 2

    def shard(self, examples):
        return np.arange(examples.start, examples.stop, 2) if isinstance(examples, slice) else examples[::2]

    def reduce(self, gradients, weight):
        total = ops.cast(weight, "float32")
        return [None if gradient is None else gradient * total / (4 * total) for gradient in gradients]

    def sum(self, array):
        return 4 * array


X, Y = normal(8, 3), normal(8, 1, seed=1)


def plain_step(model, optimizer):
    def step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)}

    return step


def by_model_fit(strategy, **options):
    model = compiled(functional())
    fit(model, X, Y, batch_size=4, strategy=strategy, **options)
    return model


def by_hl_fit(strategy, **options):
    model, optimizer = functional(), keras.optimizers.SGD(0.1)
    state = {"model": model, "optimizer": optimizer}
    feed = hl.Feed((X, Y), batch_size=4)
    hl.fit(plain_step(model, optimizer), feed, state=state, strategy=strategy, verbose=0, **options)
    return model


def by_hand(strategy):
    model = functional()
    step = hl.function(plain_step(model, keras.optimizers.SGD(0.1)))
    with strategy.scope():
        for batch in hl.Feed((X, Y), batch_size=4):
            step(*batch)
    return model


def updated(model, gradient_of, size=4, rate=0.1):
    """A linear model after a pass of plain SGD, by NumPy."""
    weights, bias = map(np.array, values_of(model))
    for start in range(0, len(X), size):
        x, y = gradient_of(X[start : start + size], Y[start : start + size])
        error = x @ weights + bias - y
        weights -= rate / 4 * 2 * x.T @ error / len(x)
        bias -= rate / 4 * 2 * error.mean(0)
    return [weights, bias]


@pytest.mark.parametrize("way", [by_model_fit, by_hl_fit])
def test_strategy_of_fit_is_asked_along_the_way_of_the_data(way, tmp_path):
    strategy = Recording()
    way(strategy, run_dir=tmp_path)
    assert set(strategy.asked) == ASKED
    assert strategy.asked.index("place") < strategy.asked.index("put") < strategy.asked.index("sum")


@pytest.mark.parametrize("way", [by_model_fit, by_hl_fit, by_hand])
def test_strategy_shards_the_examples_and_reduces_the_gradients(way):
    keras.utils.set_random_seed(1)
    expected = updated(functional(), lambda x, y: (x[::2], y[::2]))
    keras.utils.set_random_seed(1)
    for value, right in zip(values_of(way(FirstOfTwo()))[:2], expected, strict=True):
        close(value, right)


def test_strategy_reduces_gradients_before_they_are_clipped(eagerly):
    w = keras.Variable(0.0)
    optimizer = GradientTransforms(keras.optimizers.SGD(1.0), [ClipByValue(1.0)])
    with FirstOfTwo().scope():
        hl.function(lambda: hl.minimize(lambda: 8 * w, w, optimizer))()
        close(w, -1)
        hl.function(lambda: hl.minimize(lambda: 2 * w, w, optimizer))()
    close(w, -1.5)


def test_strategy_receives_the_weight_of_the_gradients(eagerly):
    weights = []

    class Weighing(SingleDevice):
        def reduce(self, gradients, weight):
            weights.append(weight)
            return gradients

    with Weighing().scope(), hl.run_eagerly(True):
        model = compiled(functional())
        fit(model, X, Y, batch_size=4)
        fit(model, X, Y, batch_size=8, sample_weight=0.5 * ones(8))
        w = keras.Variable(0.0)
        hl.minimize(lambda: 2 * w, w, keras.optimizers.SGD(), weight=7)
    close([ops.cast(weight, "float32") for weight in weights], [4, 4, 8, 7])


def test_strategy_sums_the_reported_values_of_fit_over_the_processes():
    class Other(SingleDevice):
        """The other process saw twice as many examples, with a loss of 6 each."""

        def sum(self, array):
            [total, weight] = array
            return np.array([total + 2 * 6 * weight, 3 * weight])

    history = hl.fit(
        lambda x: {"loss": ops.mean(x)}, hl.Feed(3 * ones(4, 1), batch_size=2), strategy=Other(), verbose=0
    )
    close(history.history["loss"], [5])


@pytest.mark.parametrize("way", [by_model_fit, by_hl_fit])
def test_strategy_agrees_on_a_signal_that_another_process_received(way, tmp_path):
    class Signalled(SingleDevice):
        """Rank 0 has received a signal."""

        def agree(self, value):
            return signal.SIGTERM if value is None else value

    with pytest.raises(SystemExit) as stopped:
        way(Signalled(), run_dir=tmp_path, epochs=3)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert hl.Checkpointer(tmp_path / "checkpoints", {}).steps == [1]


@pytest.mark.parametrize("way", [by_model_fit, by_hl_fit])
def test_strategy_agrees_on_the_end_of_fit(way):
    class Stopped(SingleDevice):
        """A callback of rank 0 stops the training."""

        def agree(self, value):
            return True if value is False else value

    stops = []
    counter = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: stops.append(epoch))
    way(Stopped(), epochs=3, callbacks=[counter])
    assert stops == [0]


def test_strategy_scope_ends_with_the_block_and_is_not_seen_by_other_threads():
    def gradient_step():
        w = keras.Variable(0.0)
        hl.minimize(lambda: 4 * w, w, keras.optimizers.SGD(1.0))
        return numpy(w)

    with FirstOfTwo().scope():
        inside, elsewhere = gradient_step(), in_a_thread(gradient_step)
    same([inside, elsewhere, gradient_step()], [-1, -4, -4])


def test_function_called_under_another_strategy_is_traced_again():
    w = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(1.0)
    step = hl.function(lambda: hl.minimize(lambda: 4 * w, w, optimizer))
    step()
    with FirstOfTwo().scope():
        step()
    step()
    close(w, -4 - 1 - 4)
    assert len(step.traces) == 2


@pytest.mark.parametrize("way", [by_model_fit, by_hl_fit])
def test_fit_refuses_a_strategy_that_is_none(way):
    with pytest.raises(ArgumentError, match=r"strategy takes .*'mirrored' \(of type str\).*HL003"):
        way("mirrored")
