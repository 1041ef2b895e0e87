"""Laws of means: what is reported, and what is gathered, does not depend on how examples are split into batches."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from handloom.optimizers import GradientAccumulation

# Few sizes: each is compiled.
sizes = st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=5)
numbers = st.floats(-100, 100, width=32, allow_subnormal=False)
weights = st.one_of(st.just(0.0), st.floats(0.125, 8, width=32))


@st.composite
def batches(draw):
    """Batches of values and weights, of which one at least is not zero."""
    split = draw(sizes)
    values = draw(st.lists(numbers, min_size=sum(split), max_size=sum(split)))
    weight = draw(st.lists(weights, min_size=sum(split), max_size=sum(split)))
    if not any(weight):
        weight[draw(st.integers(0, len(weight) - 1))] = 2.0
    parts = [np.split(np.array(part, "float32"), np.cumsum(split)[:-1]) for part in (values, weight)]
    return list(zip(*parts, strict=True))


def whole(batches):
    """The values and weights of all batches, in double precision."""
    return [np.concatenate(part).astype("float64") for part in zip(*batches, strict=True)]


def holds(law, examples=12):
    settings(max_examples=examples, deadline=None)(given(batches())(law))()


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def reported(step, batches):
    with hl.run_eagerly(True):
        history = hl.fit(step, hl.Feed(lambda: iter(batches)), verbose=0).history
    return {name: values[0] for name, values in history.items()}


def validated(step, batches):
    """The same of a step that does not train: to train, a batch whose `sample_weight` sums to zero is refused."""
    with hl.run_eagerly(True):
        validate = (step, hl.Feed(lambda: iter(batches)))
        history = hl.fit(lambda x: {}, np.zeros(1), validate=validate, verbose=0).history
    return {name.removeprefix("val_"): values[0] for name, values in history.items()}


def test_a_mean_by_sample_weights_is_that_of_the_whole():
    def step(x, sample_weight):
        return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}  # NaN where nothing weighs.

    def law(batches):
        values, weight = whole(batches)
        close(validated(step, batches)["mean"], np.average(values, weights=weight))

    holds(law)


def test_a_pair_of_sum_and_weight_is_the_mean_of_the_whole():
    def step(x, weight):
        return {"mean": (ops.sum(x * weight), ops.sum(weight)), "rows": (ops.sum(x), len(x))}

    def law(batches):
        values, weight = whole(batches)
        found = reported(step, batches)
        close(found["mean"], np.average(values, weights=weight))
        close(found["rows"], values.mean())

    holds(law)


def test_a_metric_is_that_of_the_whole():
    metrics = [keras.metrics.Mean(name="mean"), keras.metrics.MeanSquaredError(name="square")]

    def step(x, weight):
        metrics[0].update_state(x, sample_weight=weight)
        metrics[1].update_state(ops.zeros_like(x)[:, None], x[:, None], sample_weight=weight)
        return {"object": metrics[0], "square": metrics[1].result()}

    def law(batches):
        values, weight = whole(batches)
        found = reported(step, batches)
        close(found["object"], np.average(values, weights=weight))
        np.testing.assert_allclose(found["square"], np.average(values**2, weights=weight), rtol=1e-4, atol=1e-6)

    holds(law)


def test_no_weight_in_all_batches_is_no_mean():
    def step(x, weight):
        return {"mean": (ops.sum(x * weight), ops.sum(weight))}

    nothing = [(np.ones(2, "float32"), np.zeros(2, "float32"))] * 3
    assert np.isnan(reported(step, nothing)["mean"])


def evaluated(model, batches):
    return model.evaluate(iter(batches), return_dict=True, verbose=0)


def identity(**options):
    inputs = keras.Input((1,))
    model = hl.Model(inputs, layers.Identity()(inputs))
    model.compile(**options)
    return model


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_of_a_model_is_that_of_the_whole_with_each_reduction(reduction, weighted):
    loss = keras.losses.MeanAbsoluteError(reduction=reduction)
    model = identity(loss=loss, weighted_metrics=[keras.metrics.MeanAbsoluteError(name="metric")])

    def law(batches):
        error, weight = whole(batches)
        error, weight = np.abs(error), weight if weighted else np.ones_like(weight)
        given = [(x[:, None], np.zeros_like(x)[:, None], *([w] if weighted else [])) for x, w in batches]
        found = evaluated(model, given)
        close(found["loss"], sum(error * weight) / (len(error) if reduction == "sum_over_batch_size" else sum(weight)))
        close(found["metric"], np.average(error, weights=weight))

    holds(law, examples=25)


def test_a_sum_is_reported_as_keras_does_by_the_batch():
    model = identity(loss=keras.losses.MeanAbsoluteError(reduction="sum"))

    def law(batches):
        sums = [np.sum(np.abs(x) * w, dtype="float64") for x, w in batches]
        found = evaluated(model, [(x[:, None], np.zeros_like(x)[:, None], w) for x, w in batches])
        close(found["loss"], np.average(sums, weights=[len(x) for x, _ in batches]))

    holds(law, examples=25)


def test_a_masked_loss_divided_by_weights_is_that_of_the_whole():
    inputs = keras.Input((1, 1))
    identity = layers.Identity()
    identity.supports_masking = True
    model = hl.Model(inputs, identity(layers.Masking()(inputs)))  # Zeros are not there.
    metric = keras.metrics.MeanAbsoluteError(name="metric")
    loss = keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")
    model.compile(loss=loss, weighted_metrics=[metric])

    def law(batches):
        values, weight = whole(batches)
        weight = weight * (values != 0)
        given = [(x[:, None, None], np.zeros_like(x)[:, None, None], w[:, None]) for x, w in batches]
        found = evaluated(model, given)
        close(found["metric"], np.average(np.abs(values), weights=weight) if weight.any() else 0)
        if weight.any():
            close(found["loss"], np.average(np.abs(values), weights=weight))
        else:
            assert np.isnan(found["loss"])

    holds(law, examples=25)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_gradients_gathered_over_any_split_are_those_of_the_whole(reduction):
    kernel, optimizer = keras.Variable(0.0), GradientAccumulation(keras.optimizers.SGD(1e-3), 100)
    loss = keras.losses.MeanSquaredError(reduction=reduction)

    def step(x, weight):
        return {
            "loss": hl.minimize(lambda: loss(ops.ones_like(x), kernel * x, sample_weight=weight), kernel, optimizer)
        }

    def law(batches):
        values, weight = whole(batches)
        divisor = {"sum_over_batch_size": len(values), "mean_with_sample_weight": weight.sum(), "sum": 1}[reduction]
        kernel.assign(0.5)
        # A row each: Keras's losses take the mean over the last axis.
        reported(step, [(x[:, None], w) for x, w in batches])
        gradient = np.sum(2 * weight * values * (0.5 * values - 1)) / divisor
        np.testing.assert_allclose(ops.convert_to_numpy(kernel), 0.5 - 1e-3 * gradient, rtol=1e-4, atol=1e-4)

    holds(law, examples=8)


def test_a_window_of_examples_that_weigh_nothing_changes_nothing():
    kernel, optimizer = keras.Variable(0.5), GradientAccumulation(keras.optimizers.SGD(1.0), 2)
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")

    def step(x, weight):
        return {
            "loss": hl.minimize(lambda: loss(ops.ones_like(x), kernel * x, sample_weight=weight), kernel, optimizer)
        }

    reported(step, [(np.ones((2, 1), "float32"), np.zeros(2, "float32"))] * 2)
    assert float(ops.convert_to_numpy(kernel)) == 0.5
