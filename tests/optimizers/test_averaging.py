"""WeightAveraging weights, against the recurrences in NumPy."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import OptimizerError
from handloom.optimizers import LossScaleOptimizer, UpdateEvery, WeightAveraging, averaged_weights


def trained(optimizer, steps):
    """The weights after each step of `w <- w - 0.1 * value`, values 1, 2, ..."""
    weight = keras.Variable(1.0)
    step = hl.function(lambda value: hl.minimize(lambda: weight * value, weight, optimizer))
    seen = []
    for value in range(1, steps + 1):
        step(np.float32(value))
        seen.append(float(ops.convert_to_numpy(weight.value)))
    return weight, seen


def average(optimizer, weight):
    with averaged_weights(optimizer):
        return float(ops.convert_to_numpy(weight.value))


def test_an_exponential_average_begins_with_the_weights_themselves(eagerly):
    optimizer = WeightAveraging(keras.optimizers.SGD(0.1), decay=0.8)
    weight, seen = trained(optimizer, 4)
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.8 * expected + 0.2 * value
    np.testing.assert_allclose(average(optimizer, weight), expected, rtol=1e-6)


def test_a_plain_mean_from_a_start_at_a_pace():
    optimizer = WeightAveraging(keras.optimizers.SGD(0.1), decay=None, start=2, every=3)
    weight, seen = trained(optimizer, 7)
    np.testing.assert_allclose(average(optimizer, weight), np.mean([seen[2], seen[5]]), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.5, None], ids=["exponential", "plain"])
def test_steps_that_make_no_update_contribute_nothing(decay):
    optimizer = WeightAveraging(UpdateEvery(keras.optimizers.SGD(0.1), 2), decay)
    weight, seen = trained(optimizer, 7)
    first, second, third = seen[1::2]
    expected = np.mean([first, second, third]) if decay is None else (first + second) / 4 + third / 2
    np.testing.assert_allclose(average(optimizer, weight), expected, rtol=1e-6)
    assert int(optimizer.contributions.value) == 3


def test_the_live_weights_stay_to_the_bit_even_after_an_error():
    optimizer = WeightAveraging(keras.optimizers.SGD(0.1), decay=0.5)
    weight, seen = trained(optimizer, 3)
    with pytest.raises(KeyError), averaged_weights(optimizer):
        raise KeyError
    assert float(ops.convert_to_numpy(weight.value)) == seen[-1]


def test_a_model_evaluates_and_predicts_with_them_and_trains_on_as_if_it_had_not():
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    models = []
    for look in (True, False):
        keras.utils.set_random_seed(0)
        model = hl.Model([keras.Input((3,)), layers.Dense(1)])
        model.compile(WeightAveraging(keras.optimizers.SGD(0.1), 0.9), "mse")
        for _ in range(2):
            model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0)
            if look:
                with averaged_weights(model):
                    kernel, bias = model.get_weights()
                np.testing.assert_allclose(model.predict(x, weights="ema", verbose=0), x @ kernel + bias, rtol=1e-5)
                expected = np.mean((x @ kernel + bias - x[:, :1]) ** 2)
                np.testing.assert_allclose(model.evaluate(x, x[:, :1], weights="ema", verbose=0), expected, rtol=1e-4)
        models.append(model.get_weights())
    for one, other in zip(*models, strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_is_found_inside_others():
    optimizer = LossScaleOptimizer(WeightAveraging(keras.optimizers.SGD(0.1), 0.5))
    weight, seen = trained(optimizer, 1)
    np.testing.assert_allclose(average(optimizer, weight), seen[0])


def test_without_averages_there_is_an_error_with_the_cure():
    model = hl.Model([keras.Input((1,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(OptimizerError, match=r"no averaged weights: wrap the optimizer, handloom\.opt"):
        model.evaluate(np.ones((2, 1)), np.ones((2, 1)), weights="ema", verbose=0)
    with pytest.raises(ValueError, match=r'weights takes "ema".*received \'best\'.*HL033'):
        model.predict(np.ones((2, 1)), weights="best", verbose=0)


def test_before_the_first_contribution_too():
    optimizer = WeightAveraging("sgd", start=5)
    trained(optimizer, 2)
    with pytest.raises(OptimizerError, match="has averaged nothing yet: averaging begins after start=5 updates"):
        average(optimizer, None)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": 0.0}, {"decay": -1}, {"start": -1}, {"every": 0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"WeightAveraging takes a.*received {next(iter(options))}="):
        WeightAveraging("sgd", **options)
