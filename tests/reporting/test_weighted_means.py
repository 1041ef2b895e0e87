"""Laws of means: reported values and accumulated gradients do not depend on how examples are split into batches."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from handloom.optimizers import GradientAccumulation
from tests.models import compiled, functional
from tests.numbers import close, ones

# Few sizes: each is compiled.
sizes = st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=5)
numbers = st.floats(-100, 100, width=32, allow_subnormal=False)
weights = st.one_of(st.just(0.0), st.floats(0.125, 8, width=32))


@st.composite
def batches(draw):
    """Batches of values and weights; at least one weight is not zero."""
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


def near(found, expected, rtol=1e-5):
    close(found, expected, rtol=rtol, atol=1e-4)


def reported(step, batches):
    with hl.run_eagerly(True):
        history = hl.fit(step, lambda: iter(batches), verbose=0).history
    return {name: values[0] for name, values in history.items()}


def validated(step, batches):
    """The same for a validation step: in training, a batch whose `sample_weight` sums to zero is refused."""
    with hl.run_eagerly(True):
        validate = (step, hl.Feed(lambda: iter(batches)))
        history = hl.fit(lambda x: {}, np.zeros(1), validate=validate, verbose=0).history
    return {name.removeprefix("val_"): values[0] for name, values in history.items()}


def test_validation_averages_by_sample_weights_as_over_the_whole():
    def step(x, sample_weight):
        return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}  # NaN if all weights are zero.

    def law(batches):
        values, weight = whole(batches)
        near(validated(step, batches)["mean"], np.average(values, weights=weight))

    holds(law)


def test_fit_averages_scalars_pairs_and_metrics_as_over_the_whole():
    mean, square = keras.metrics.Mean(), keras.metrics.MeanSquaredError()

    def step(x, weight):
        mean.update_state(x, sample_weight=weight)
        square.update_state(ops.zeros_like(x)[:, None], x[:, None], sample_weight=weight)
        pairs = {"pair": (ops.sum(x * weight), ops.sum(weight)), "rows": (ops.sum(x), len(x))}
        return {"scalar": ops.mean(x), "metric": mean, "square": square.result()} | pairs

    def law(batches):
        values, weight = whole(batches)
        found = reported(step, batches)
        for name, expected in (("scalar", values.mean()), ("rows", values.mean())):
            near(found[name], expected)
        for name in ("pair", "metric"):
            near(found[name], np.average(values, weights=weight))
        near(found["square"], np.average(values**2, weights=weight), rtol=1e-4)

    holds(law)


def test_fit_reports_nan_for_pairs_whose_weights_are_all_zero():
    nothing = [(ones(2), 0 * ones(2))] * 3
    assert np.isnan(reported(lambda x, weight: {"mean": (ops.sum(x * weight), ops.sum(weight))}, nothing)["mean"])


def evaluated(model, batches):
    return model.evaluate(iter(batches), return_dict=True, verbose=0)


def identity(loss, **options):
    return compiled(functional(layers.Identity(), inputs=1), loss=loss, **options)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
def test_evaluate_returns_the_loss_of_the_whole_or_the_average_of_sums(reduction, weighted):
    loss = keras.losses.MeanAbsoluteError(reduction=reduction)
    model = identity(loss, weighted_metrics=[keras.metrics.MeanAbsoluteError(name="metric")])

    def law(batches):
        if not weighted:
            batches = [(x, np.ones_like(w)) for x, w in batches]
        values, weight = whole(batches)
        mean = np.average(np.abs(values), weights=weight)
        sums = [np.sum(np.abs(x) * w, dtype="float64") for x, w in batches]
        expected = {
            "sum_over_batch_size": sum(sums) / len(values),
            "mean_with_sample_weight": mean,
            "sum": np.average(sums, weights=[len(x) for x, _ in batches]),  # As Keras does.
        }
        found = evaluated(model, [(x[:, None], 0 * x[:, None], w)[: 2 + weighted] for x, w in batches])
        near([found["loss"], found["metric"]], [expected[reduction], mean])

    holds(law, examples=25)


def test_evaluate_returns_the_masked_loss_of_the_whole_divided_by_weights():
    inputs, layer = keras.Input((1, 1)), layers.Identity()
    layer.supports_masking = True
    model = hl.Model(inputs, layer(layers.Masking()(inputs)))  # Zeros are masked.
    loss = keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")
    compiled(model, loss=loss, weighted_metrics=[keras.metrics.MeanAbsoluteError(name="metric")])

    def law(batches):
        values, weight = whole(batches)
        weight = weight * (values != 0)
        given = [(x[:, None, None], np.zeros_like(x)[:, None, None], w[:, None]) for x, w in batches]
        found, mean = evaluated(model, given), np.average(np.abs(values), weights=weight) if weight.any() else 0
        near(found["metric"], mean)
        near(found["loss"], mean if weight.any() else np.nan)

    holds(law, examples=25)


def accumulating(reduction, rate, steps):
    """A variable, and a step that minimizes a squared error in it with accumulated gradients."""
    kernel, optimizer = keras.Variable(0.5), GradientAccumulation(keras.optimizers.SGD(rate), steps)
    loss = keras.losses.MeanSquaredError(reduction=reduction)

    def step(x, weight):
        found = hl.minimize(lambda: loss(ops.ones_like(x), kernel * x, sample_weight=weight), kernel, optimizer)
        return {"loss": found}

    return kernel, step


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_gradient_accumulation_over_any_split_equals_the_gradient_of_the_whole(reduction):
    kernel, step = accumulating(reduction, rate=1e-3, steps=100)

    def law(batches):
        values, weight = whole(batches)
        divisor = {"sum_over_batch_size": len(values), "mean_with_sample_weight": weight.sum(), "sum": 1}[reduction]
        kernel.assign(0.5)
        # One example per row: Keras's losses take the mean over the last axis.
        reported(step, [(x[:, None], w) for x, w in batches])
        gradient = np.sum(2 * weight * values * (0.5 * values - 1)) / divisor
        near(kernel, 0.5 - 1e-3 * gradient, rtol=1e-4)

    holds(law, examples=8)


def test_gradient_accumulation_of_examples_that_all_weigh_zero_changes_nothing():
    kernel, step = accumulating("mean_with_sample_weight", rate=1.0, steps=2)
    reported(step, [(ones(2, 1), 0 * ones(2))] * 2)
    close(kernel, 0.5)
