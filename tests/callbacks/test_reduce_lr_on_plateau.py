"""Lowers learning rates when it gets no better."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.callbacks import ReduceLROnPlateau
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation
from tests.callbacks.scripted import Scripted, X, number, run

NAN = np.nan


def rates(script, optimizer=None, **options):
    callback = ReduceLROnPlateau("loss", factor=0.5, **options)
    return run(Scripted(script, optimizer or keras.optimizers.SGD(1.0)), callback)["learning_rate"]


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ([3, 2, 2, 2, 2], {"patience": 1}, [1, 1, 1, 0.5, 0.25]),
        ([3, 2, 2, 2, 2, 2], {"patience": 2}, [1, 1, 1, 1, 0.5, 0.5]),
        ([3, 2, 2, 2, 2, 2], {"patience": 1, "cooldown": 2}, [1, 1, 1, 0.5, 0.5, 0.25]),
        ([2, 2, 2, 2], {"patience": 1, "min_lr": 0.3}, [1, 1, 0.5, 0.3]),
        ([2, 2, 2, 2, 2, 2], {"patience": 1, "min_lr": 0.3}, [1, 1, 0.5, 0.3, 0.3, 0.3]),
        ([1, 2, 2, 2], {"patience": 1, "mode": "max"}, [1, 1, 1, 0.5]),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 1, "min_delta": 0.25}, [1, 1, 0.5, 0.25, 0.25]),
        ([NAN, 2, NAN, NAN], {"patience": 1}, [1, 1, 1, 0.5]),
    ],
)
def test_the_rate_falls_in_the_right_epoch(script, options, expected):
    assert rates(script, **options) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_without_missing_values_it_does_what_keras_does(seed):
    script = np.random.default_rng(seed).integers(0, 4, 12).astype("float32")
    options = {"factor": 0.5, "patience": 1 + seed % 2, "cooldown": seed, "min_lr": 0.01}
    model = Scripted(script, keras.optimizers.SGD(1.0))
    theirs = run(model, keras.callbacks.ReduceLROnPlateau("loss", **options))["learning_rate"]
    model = Scripted(script, keras.optimizers.SGD(1.0))
    assert run(model, ReduceLROnPlateau("loss", **options))["learning_rate"] == theirs


def test_the_next_update_uses_the_new_rate(eagerly):
    weight = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(1.0)
    values = []

    def step(x):
        hl.minimize(lambda: -weight, [weight], optimizer)  # Each update adds the rate.
        return {"loss": ops.mean(x)}

    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: values.append(number(weight)))
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1)
    hl.fit(step, X, epochs=4, state={"w": weight, "o": optimizer}, callbacks=[note, plateau], verbose=0)
    assert values == [1, 2, 2.5, 2.75]


class TwoParts(hl.Model):
    """Each part's weight falls by its optimizer's rate."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = (layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in range(2))
        for part in (self.generator, self.critic):
            part.build((None, 1))
        self.built = True

    def call(self, x):
        return self.generator(x) + self.critic(x)

    def train_step(self, x):
        self.minimize(lambda: ops.sum(self.generator.kernel) + ops.sum(self.critic.kernel))
        return {"loss": ops.mean(x)}

    def weights_now(self):
        return [float(ops.convert_to_numpy(part.kernel)[0, 0]) for part in (self.generator, self.critic)]


@pytest.mark.parametrize(
    ("name", "expected", "reported"),
    [
        (None, [-2.75, -5.5], {"learning_rate_generator": [1, 1, 0.5, 0.25], "learning_rate_*": [2, 2, 1, 0.5]}),
        ("generator", [-2.75, -8], {"learning_rate_generator": [1, 1, 0.5, 0.25]}),
        ("*", [-4, -5.5], {"learning_rate_*": [2, 2, 1, 0.5]}),
    ],
)
def test_of_optimizers_by_name_each_has_its_own_rate(name, expected, reported):
    model = TwoParts()
    model.compile({"generator": keras.optimizers.SGD(1.0), "*": GradientAccumulation(keras.optimizers.SGD(2.0), 1)})
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, optimizer=name)
    history = model.fit(X, epochs=4, callbacks=[plateau], verbose=0).history
    assert {name: values for name, values in history.items() if name != "loss"} == reported
    assert model.weights_now() == expected


def test_a_name_that_there_is_not_is_said_before_training():
    model = TwoParts()
    model.compile({"generator": "sgd", "*": "sgd"})
    with pytest.raises(OptimizerError, match=r"no optimizer named 'critic'; there are: 'generator', '\*'"):
        model.fit(X, callbacks=[ReduceLROnPlateau("loss", optimizer="critic")], verbose=0)


def test_a_rate_that_follows_a_schedule_is_refused_before_training():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model = Scripted([1, 2], keras.optimizers.SGD(schedule))
    with pytest.raises(OptimizerError, match=r"follows a schedule of its own and cannot be set.*learning_rate=1e-3"):
        run(model, ReduceLROnPlateau("loss"))
    assert float(model.count) == 0


def test_a_factor_of_one_is_refused():
    with pytest.raises(ValueError, match="factor"):
        ReduceLROnPlateau(factor=1.0)


def test_it_says_what_it_does_when_asked(capsys):
    rates([2, 2], patience=1, verbose=1)
    assert "Epoch 2: lowering the learning rate to 0.5" in capsys.readouterr().out
