"""`WeightAveraging` and `averaged_weights`, against the recurrences in NumPy."""

import keras
import numpy as np
import pytest

import handloom as hl
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation, LossScaleOptimizer, UpdateEvery, WeightAveraging, averaged_weights
from tests.models import compiled, fit, functional
from tests.numbers import close, each_same, normal, numpy, ones

SGD = keras.optimizers.SGD


def trained(optimizer, steps):
    """The weights after each step of `w <- w - 0.1 * value`, values 1, 2, ..."""
    weight = keras.Variable(1.0)
    step = hl.function(lambda value: hl.minimize(lambda: weight * value, weight, optimizer))
    seen = []
    for value in range(1, steps + 1):
        step(np.float32(value))
        seen.append(float(numpy(weight)))
    return weight, seen


def average(optimizer, weight):
    with averaged_weights(optimizer):
        return float(numpy(weight))


def test_weight_averaging_with_decay_starts_with_the_weights_themselves(eagerly):
    optimizer = WeightAveraging(SGD(0.1), decay=0.8)
    weight, seen = trained(optimizer, 4)
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.8 * expected + 0.2 * value
    close(average(optimizer, weight), expected)


def test_weight_averaging_without_decay_is_the_mean_from_start_on():
    optimizer = WeightAveraging(SGD(0.1), decay=None, start=2, every=3)
    weight, seen = trained(optimizer, 7)
    close(average(optimizer, weight), np.mean([seen[2], seen[5]]))


@pytest.mark.parametrize("decay", [0.5, None], ids=["exponential", "mean"])
def test_weight_averaging_counts_updates_and_not_steps(decay):
    optimizer = WeightAveraging(UpdateEvery(SGD(0.1), 2), decay)
    weight, seen = trained(optimizer, 7)
    first, second, third = seen[1::2]
    close(
        average(optimizer, weight),
        np.mean([first, second, third]) if decay is None else (first + second) / 4 + third / 2,
    )
    assert int(optimizer.contributions.value) == 3


def test_averaged_weights_restores_the_live_weights_after_an_error():
    optimizer = WeightAveraging(SGD(0.1), decay=0.5)
    weight, seen = trained(optimizer, 3)
    with pytest.raises(KeyError), averaged_weights(optimizer):
        raise KeyError
    assert float(numpy(weight)) == seen[-1]


def test_averaged_weights_serve_evaluate_and_predict_and_do_not_change_training():
    x, models = normal(32, 3), []
    for look in (True, False):
        keras.utils.set_random_seed(0)
        model = compiled(functional(), WeightAveraging(SGD(0.1), 0.9))
        for _ in range(2):
            fit(model, x, x[:, :1], batch_size=8)
            if look:
                with averaged_weights(model):
                    kernel, bias = model.get_weights()
                expected = x @ kernel + bias
                close(model.predict(x, weights="ema", verbose=0), expected)
                error = np.mean((expected - x[:, :1]) ** 2)
                close(model.evaluate(x, x[:, :1], weights="ema", verbose=0), error, rtol=1e-4)
        models.append(model)
    each_same(*(model.get_weights() for model in models))


def test_weight_averaging_works_inside_loss_scaling():
    optimizer = LossScaleOptimizer(WeightAveraging(SGD(0.1), 0.5))
    weight, seen = trained(optimizer, 1)
    close(average(optimizer, weight), seen[0])


def test_weight_averaging_around_optimizers_by_name_counts_the_updates_of_the_model():
    model = functional()
    model.dense = model.layers[-1]
    compiled(model, WeightAveraging({"dense.kernel": SGD(0.1), "*": SGD(0.2)}, decay=None))
    seen = []
    for _ in range(3):
        fit(model, ones(4, 3), ones(4, 1))
        seen.append(model.get_weights())
    with averaged_weights(model):
        for index, found in enumerate(model.get_weights()):
            close(found, np.mean([weights[index] for weights in seen], axis=0))


def test_averaged_weights_without_an_average_say_what_to_do():
    model = compiled(functional())
    with pytest.raises(OptimizerError, match=r"no averaged weights.*handloom\.optimizers\.WeightAveraging.*HL305"):
        model.evaluate(ones(2, 3), ones(2, 1), weights="ema", verbose=0)
    with pytest.raises(ValueError, match=r'weights takes "ema", or None.*received \'best\'.*HL033'):
        model.predict(ones(2, 3), weights="best", verbose=0)
    optimizer = WeightAveraging("sgd", start=5)
    trained(optimizer, 2)
    with pytest.raises(OptimizerError, match="has averaged nothing yet; it begins after update 5"):
        average(optimizer, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"decay": decay}, "decay between 0 and 1.*HL303") for decay in (1.0, 0.0, -1, "0.9")),
        ({"start": -1}, r"start=...\) takes a whole number, at least 0"),
        ({"every": 0}, r"every=...\) takes a whole number, at least 1"),
        ({"inner_optimizer": GradientAccumulation("sgd", 2)}, r"GradientAccumulation\(WeightAveraging\(.*HL304"),
    ],
)
def test_weight_averaging_refuses_arguments_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        WeightAveraging(**{"inner_optimizer": "sgd", **options})
