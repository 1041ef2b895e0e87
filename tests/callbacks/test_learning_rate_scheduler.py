"""`LearningRateScheduler` sets learning rates by a function of the epoch or the step."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.callbacks import LearningRateScheduler
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation
from tests.callbacks.scripted import TwoParts, X, at, mean_step, multi
from tests.models import compiled, fit, functional
from tests.numbers import numpy


def updates(schedule, *, optimizer=None, epochs=3, steps=2, **options):
    """The change of a weight in each step, which is the rate of its update, and the rates that the epochs report."""
    weight = keras.Variable(0.0)
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    seen = []

    def step(x):
        hl.minimize(lambda: -weight, [weight], optimizer)
        return {"loss": ops.mean(x)}

    note = at("on_train_batch_end", lambda batch, logs: seen.append(numpy(weight)))
    scheduler = LearningRateScheduler(schedule, **options)
    feed = hl.Feed(np.zeros((steps, 1), "float32"), batch_size=1)
    state = {"weight": weight, "optimizer": optimizer}
    history = hl.fit(step, feed, epochs=epochs, state=state, callbacks=[scheduler, note], verbose=0)
    return np.diff([0.0, *seen]).tolist(), history.history["learning_rate"]


def named():
    return TwoParts({"generator": keras.optimizers.SGD(1.0), "*": keras.optimizers.SGD(2.0)})


def test_learning_rate_scheduler_calls_the_schedule_with_the_epoch_and_the_rate(eagerly):
    asked = []

    def schedule(epoch, rate):
        asked.append((epoch, rate))
        return [0.5, 2.0, 0.25][epoch]

    taken, reported = updates(schedule)
    assert taken == [0.5, 0.5, 2, 2, 0.25, 0.25]
    assert reported == [0.5, 2, 0.25]
    assert asked == [(0, 1.0), (1, 0.5), (2, 2.0)]


def test_learning_rate_scheduler_acts_every_few_epochs(eagerly):
    taken, _ = updates(lambda epoch, rate: 2.0**-epoch, epochs=4, steps=1, every=hl.every(epochs=2))
    assert taken == [1, 1, 0.25, 0.25]


def test_learning_rate_scheduler_acts_before_steps_of_the_whole_run(eagerly):
    taken, reported = updates(lambda step, rate: step + 1.0, every=hl.every(steps=2), epochs=2, steps=3)
    assert taken == [1, 1, 3, 3, 5, 5]
    assert reported == [3, 5]


@pytest.mark.parametrize("rate", [2, np.float32(2), np.array(2.0), "tensor"], ids=["int", "float32", "array", "tensor"])
def test_learning_rate_scheduler_takes_a_schedule_of_the_epoch_alone_and_any_number(rate):
    schedule = lambda epoch: epoch + (ops.convert_to_tensor(2.0) if rate == "tensor" else rate)  # noqa: E731
    assert updates(schedule, epochs=2)[1] == [2, 3]


def test_learning_rate_scheduler_refuses_a_rate_that_is_not_a_number():
    with pytest.raises(ValueError, match=r"must return a number; it returned None.*HL757"):
        updates(lambda epoch: None)


def test_learning_rate_scheduler_raises_an_error_of_the_schedule():
    def schedule(epoch, rate):
        raise TypeError("broken within")

    with pytest.raises(TypeError, match="broken within"):
        updates(schedule)


def test_learning_rate_scheduler_does_not_retrace():
    traced = []

    class Traced(TwoParts):
        def train_step(self, x):
            traced.append(True)
            return super().train_step(x)

    model = Traced("sgd")
    fit(model, X)
    before = len(traced)
    fit(model, X, epochs=5, callbacks=[LearningRateScheduler(lambda epoch: 1 / (1 + epoch))])
    assert len(traced) == before


@pytest.mark.parametrize(("name", "expected"), [(None, [-0.5, -1]), ("generator", [-0.5, -4]), ("*", [-2, -1])])
def test_learning_rate_scheduler_sets_the_rates_of_optimizers_by_name(name, expected):
    model = named()
    scheduler = LearningRateScheduler(lambda epoch, rate: rate / 4, optimizer=name)
    fit(model, np.zeros((2, 1), "float32"), batch_size=1, callbacks=[scheduler])
    assert model.weights_now() == expected


def test_learning_rate_scheduler_of_keras_sets_the_rates_of_optimizers_by_name():
    model = named()
    fit(model, X, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 4)])
    assert model.weights_now() == [-0.25, -0.5]


@pytest.mark.parametrize(
    ("scheduler", "by_function"),
    [(LearningRateScheduler, False), (LearningRateScheduler, True), (keras.callbacks.LearningRateScheduler, False)],
)
def test_learning_rate_scheduler_sets_the_rates_of_a_multi_optimizer(scheduler, by_function):
    model = multi(by_function)
    history = fit(model, X, epochs=2, callbacks=[scheduler(lambda epoch, rate: rate / 4)])
    assert history["learning_rate_one"] == [0.25, 0.0625]
    assert history["learning_rate_other"] == [0.5, 0.125]
    assert model.weights_now() == [-0.3125, -0.625]


def test_learning_rate_scheduler_sets_the_rate_of_a_wrapped_optimizer():
    inner = keras.optimizers.SGD(1.0)
    taken, reported = updates(lambda epoch: epoch + 2.0, optimizer=GradientAccumulation(inner, 2), epochs=2)
    assert taken == [0, 2, 0, 3]
    assert reported == [2, 3]
    assert float(inner.learning_rate) == 3


def test_learning_rate_scheduler_finds_optimizers_by_their_names_in_the_state():
    state = {name: keras.optimizers.SGD(1.0) for name in ("g_optimizer", "d_optimizer")}
    scheduler = LearningRateScheduler(lambda epoch: 0.5, optimizer="g_optimizer")
    history = hl.fit(mean_step, X, state=state, callbacks=[scheduler], verbose=0).history
    assert history == {"mean": [0], "learning_rate_g_optimizer": [0.5]}
    assert [float(optimizer.learning_rate) for optimizer in state.values()] == [0.5, 1.0]


def test_learning_rate_scheduler_without_an_optimizer_is_an_error():
    with pytest.raises(OptimizerError, match=r'no optimizer.*state=\{"model": model, "optimizer": optimizer\}.*HL330'):
        hl.fit(mean_step, X, callbacks=[LearningRateScheduler(lambda epoch: 1.0)], verbose=0)


@pytest.mark.parametrize(
    "rate", [keras.optimizers.schedules.CosineDecay(0.1, 9), lambda: 0.1], ids=["schedule", "function"]
)
def test_learning_rate_scheduler_refuses_a_rate_with_a_schedule_before_training(rate):
    model = compiled(functional(inputs=1), {"*": keras.optimizers.SGD(rate)})
    with pytest.raises(OptimizerError, match=r"optimizer '\*' follows a schedule of its own and cannot be set"):
        fit(model, X, X, callbacks=[LearningRateScheduler(lambda epoch: 1.0)])
    assert int(model.optimizer["*"].iterations) == 0


@pytest.mark.parametrize("every", [hl.every(seconds=1), "epoch", 5])
def test_learning_rate_scheduler_takes_a_schedule_of_epochs_or_steps(every):
    words = r"every takes hl.every\(epochs=...\) or hl.every\(steps=...\); received"
    with pytest.raises(ValueError, match=words):
        LearningRateScheduler(lambda epoch: 1.0, every=every)


def test_learning_rate_scheduler_prints_the_new_rate(capsys):
    updates(lambda epoch: 0.5, verbose=1, epochs=1)
    assert "Epoch 0: setting the learning rate to 0.5" in capsys.readouterr().out
