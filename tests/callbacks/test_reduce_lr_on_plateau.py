"""`ReduceLROnPlateau` lowers learning rates when a value no longer improves."""

import keras
import numpy as np
import pytest

from handloom.callbacks import ReduceLROnPlateau
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation
from tests.callbacks.scripted import NAN, Scripted, TwoParts, X, multi, run
from tests.models import fit


def rates(script, callback):
    return run(Scripted(script, keras.optimizers.SGD(1.0)), callback)["learning_rate"]


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ([3, 2, 2, 2, 2], {"patience": 1}, [1, 1, 1, 0.5, 0.25]),
        ([3, 2, 2, 2, 2, 2], {"patience": 2}, [1, 1, 1, 1, 0.5, 0.5]),
        ([3, 2, 2, 2, 2, 2], {"patience": 1, "cooldown": 2}, [1, 1, 1, 0.5, 0.5, 0.25]),
        ([2, 2, 2, 2, 2, 2], {"patience": 1, "min_lr": 0.3}, [1, 1, 0.5, 0.3, 0.3, 0.3]),
        ([1, 2, 2, 2], {"patience": 1, "mode": "max"}, [1, 1, 1, 0.5]),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 1, "min_delta": 0.25}, [1, 1, 0.5, 0.25, 0.25]),
        ([NAN, 2, NAN, NAN], {"patience": 1}, [1, 1, 1, 0.5]),
    ],
)
def test_reduce_lr_on_plateau_lowers_the_rate_in_the_right_epoch(script, options, expected):
    assert rates(script, ReduceLROnPlateau("loss", factor=0.5, **options)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_reduce_lr_on_plateau_lowers_the_rate_as_keras_does(seed):
    script = np.random.default_rng(seed).integers(0, 4, 12).astype("float32")
    options = {"factor": 0.5, "patience": 1 + seed % 2, "cooldown": seed, "min_lr": 0.01}
    found, expected = (
        rates(script, cls("loss", **options)) for cls in (ReduceLROnPlateau, keras.callbacks.ReduceLROnPlateau)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("name", "expected", "reported"),
    [
        (None, [-2.75, -5.5], {"learning_rate_generator": [1, 1, 0.5, 0.25], "learning_rate_*": [2, 2, 1, 0.5]}),
        ("generator", [-2.75, -8], {"learning_rate_generator": [1, 1, 0.5, 0.25]}),
        ("*", [-4, -5.5], {"learning_rate_*": [2, 2, 1, 0.5]}),
    ],
)
def test_reduce_lr_on_plateau_lowers_the_rates_of_optimizers_by_name(name, expected, reported, eagerly):
    wrapped = GradientAccumulation(keras.optimizers.SGD(2.0), 1)
    model = TwoParts({"generator": keras.optimizers.SGD(1.0), "*": wrapped})
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, optimizer=name)
    history = fit(model, X, epochs=4, callbacks=[plateau])
    assert history == {"loss": [0] * 4, **reported}
    assert model.weights_now() == expected  # The next update uses the new rate.


def test_reduce_lr_on_plateau_refuses_an_unknown_optimizer_before_training():
    model = TwoParts({"generator": "sgd", "*": "sgd"})
    with pytest.raises(OptimizerError, match=r"no optimizer named 'critic'; there are: 'generator', '\*'.*HL331"):
        fit(model, X, callbacks=[ReduceLROnPlateau("loss", optimizer="critic")])


def test_reduce_lr_on_plateau_refuses_a_rate_with_a_schedule_before_training():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model = Scripted([1, 2], keras.optimizers.SGD(schedule))
    with pytest.raises(OptimizerError, match=r"schedule of its own and cannot be set.*learning_rate=1e-3.*HL332"):
        run(model, ReduceLROnPlateau("loss"))
    assert float(model.count) == 0


def test_reduce_lr_on_plateau_refuses_a_factor_of_one():
    with pytest.raises(ValueError, match="factor"):
        ReduceLROnPlateau(factor=1.0)


def test_reduce_lr_on_plateau_prints_the_new_rate(capsys):
    rates([2, 2], ReduceLROnPlateau("loss", factor=0.5, patience=1, verbose=1))
    assert "Epoch 2: lowering the learning rate to 0.5" in capsys.readouterr().out


def test_reduce_lr_on_plateau_lowers_the_rates_of_a_multi_optimizer():
    history = fit(multi(), X, epochs=3, callbacks=[ReduceLROnPlateau("loss", factor=0.5, patience=1)])
    assert history["learning_rate_one"] == [1, 1, 0.5]
    assert history["learning_rate_other"] == [2, 2, 1]
