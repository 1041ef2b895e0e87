"""Sets learning rates by a function of the epoch or the step."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.callbacks import LearningRateScheduler
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation
from tests.callbacks.scripted import X, number
from tests.callbacks.test_reduce_lr_on_plateau import TwoParts


def sums(schedule, *, optimizer=None, epochs=3, steps=2, **options):
    """A weight to which each update adds the rate, after each step; and what the epochs reported."""
    weight = keras.Variable(0.0)
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    seen = []

    def step(x):
        hl.minimize(lambda: -weight, [weight], optimizer)
        return {"loss": ops.mean(x)}

    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(number(weight)))
    scheduler = LearningRateScheduler(schedule, **options)
    feed = hl.Feed(np.zeros((steps, 1), "float32"), batch_size=1)
    state = {"weight": weight, "optimizer": optimizer}
    history = hl.fit(step, feed, epochs=epochs, state=state, callbacks=[scheduler, note], verbose=0)
    return np.diff([0.0, *seen]).tolist(), history.history["learning_rate"]


def test_before_each_epoch_the_schedule_is_asked_with_its_number_and_the_rate(eagerly):
    asked = []

    def schedule(epoch, rate):
        asked.append((epoch, rate))
        return [0.5, 2.0, 0.25][epoch]

    taken, reported = sums(schedule)
    assert taken == [0.5, 0.5, 2, 2, 0.25, 0.25]
    assert reported == [0.5, 2, 0.25]
    assert asked == [(0, 1.0), (1, 0.5), (2, 2.0)]


def test_every_so_many_epochs(eagerly):
    taken, _ = sums(lambda epoch, rate: 2.0**-epoch, epochs=4, steps=1, every=hl.every(epochs=2))
    assert taken == [1, 1, 0.25, 0.25]


def test_before_steps_counted_over_the_whole_run(eagerly):
    taken, reported = sums(lambda step, rate: step + 1.0, every=hl.every(steps=2), epochs=2, steps=3)
    assert taken == [1, 1, 3, 3, 5, 5]
    assert reported == [3, 5]


def test_a_schedule_of_the_number_alone():
    assert sums(lambda epoch: epoch + 1.0)[1] == [1, 2, 3]


@pytest.mark.parametrize("rate", [2, np.float32(2), np.array(2.0), "tensor"], ids=["int", "float32", "array", "tensor"])
def test_a_rate_may_be_any_number(rate):
    assert sums(lambda epoch: ops.convert_to_tensor(2.0) if rate == "tensor" else rate, epochs=1)[1] == [2]


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="must return the learning rate as a number; it returned None"):
        sums(lambda epoch: None)


def test_an_error_within_a_schedule_comes_out():
    def schedule(epoch, rate):
        raise TypeError("broken within")

    with pytest.raises(TypeError, match="broken within"):
        sums(schedule)


def test_nothing_is_compiled_again():
    traced = []

    class Traced(TwoParts):
        def train_step(self, x):
            traced.append(True)
            return super().train_step(x)

    model = Traced()
    model.compile("sgd")
    model.fit(X, verbose=0)
    before = len(traced)
    model.fit(X, epochs=5, callbacks=[LearningRateScheduler(lambda epoch: 1 / (1 + epoch))], verbose=0)
    assert len(traced) == before


@pytest.mark.parametrize(("name", "expected"), [(None, [-0.5, -1]), ("generator", [-0.5, -4]), ("*", [-2, -1])])
def test_of_optimizers_by_name_each_is_asked_about_with_its_own_rate(name, expected):
    model = TwoParts()
    model.compile({"generator": keras.optimizers.SGD(1.0), "*": keras.optimizers.SGD(2.0)})
    scheduler = LearningRateScheduler(lambda epoch, rate: rate / 4, optimizer=name)
    model.fit(np.zeros((2, 1), "float32"), batch_size=1, callbacks=[scheduler], verbose=0)
    assert model.weights_now() == expected


def test_around_other_optimizers_it_sets_the_inner_rate():
    inner = keras.optimizers.SGD(1.0)
    taken, reported = sums(lambda epoch: epoch + 2.0, optimizer=GradientAccumulation(inner, 2), epochs=2)
    assert taken == [0, 2, 0, 3]
    assert reported == [2, 3]
    assert float(inner.learning_rate) == 3


def test_keras_sets_the_rates_of_optimizers_by_name_too():
    model = TwoParts()
    model.compile({"generator": keras.optimizers.SGD(1.0), "*": keras.optimizers.SGD(2.0)})
    model.fit(X, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 4)], verbose=0)
    assert model.weights_now() == [-0.25, -0.5]


def test_several_optimizers_of_a_plain_step_are_known_by_their_names_in_the_state():
    one, other = keras.optimizers.SGD(1.0), keras.optimizers.SGD(1.0)
    scheduler = LearningRateScheduler(lambda epoch: 0.5, optimizer="g_optimizer")
    state = {"g_optimizer": one, "d_optimizer": other}
    history = hl.fit(lambda x: {"x": ops.mean(x)}, X, state=state, callbacks=[scheduler], verbose=0)
    assert history.history["learning_rate_g_optimizer"] == [0.5]
    assert (float(one.learning_rate), float(other.learning_rate)) == (0.5, 1.0)


def test_without_an_optimizer_the_error_says_what_to_do():
    with pytest.raises(OptimizerError, match=r'no optimizer.*state=\{"model": model, "optimizer": optimizer\}'):
        hl.fit(lambda x: {"x": ops.mean(x)}, X, callbacks=[LearningRateScheduler(lambda epoch: 1.0)], verbose=0)


@pytest.mark.parametrize(
    "rate", [keras.optimizers.schedules.CosineDecay(0.1, 9), lambda: 0.1], ids=["schedule", "function"]
)
def test_a_rate_that_follows_a_schedule_is_refused_before_training(rate):
    model = hl.Model([keras.Input((1,)), layers.Dense(1)])
    model.compile({"*": keras.optimizers.SGD(rate)}, "mse")
    with pytest.raises(OptimizerError, match=r"optimizer '\*' follows a schedule of its own and cannot be set"):
        model.fit(X, X, callbacks=[LearningRateScheduler(lambda epoch: 1.0)], verbose=0)
    assert int(model.optimizer["*"].iterations) == 0


@pytest.mark.parametrize("every", [hl.every(seconds=1), "epoch", 5])
def test_when_it_is_to_act_must_repeat(every):
    with pytest.raises(ValueError, match=r"every takes hl.every\(epochs=...\) or hl.every\(steps=...\)"):
        LearningRateScheduler(lambda epoch: 1.0, every=every)


def test_it_says_what_it_does_when_asked(capsys):
    sums(lambda epoch: 0.5, verbose=1, epochs=1)
    assert "Epoch 0: setting the learning rate to 0.5" in capsys.readouterr().out
