"""The optimizers of `compile`, and the errors about those used without it."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom.errors import OptimizerError
from handloom.optimizers import (
    GradientAccumulation,
    GradientTransforms,
    LossScaleOptimizer,
    NamedOptimizers,
    WeightAveraging,
)
from tests.models import built, compiled, fit, functional, sequential
from tests.numbers import close, normal, numpy
from tests.test_pain import START, CustomStep, StepWithGradients

X, Y = normal(40, 3), normal(40, 1, seed=1)
RATE, STEPS, MOMENTUM = 0.1, 4, 0.9
SGD = keras.optimizers.SGD


CUSTOM = [type(step.__name__, (step, hl.Model), {}) for step in (CustomStep, StepWithGradients)]


def linear(cls, optimizer):
    model = compiled(functional(layers.Dense(1, use_bias=False), cls=cls), optimizer)
    model.set_weights([START])
    return model


@pytest.mark.parametrize("cls", [hl.Model, *CUSTOM])
def test_compile_makes_keras_accumulation_equal_the_big_batch_and_average_its_updates_alone(cls, eagerly):
    model = linear(cls, SGD(RATE, use_ema=True, ema_momentum=MOMENTUM, gradient_accumulation_steps=STEPS))
    fit(model, X, Y, batch_size=4)
    weights, updated = START, []
    for first in range(0, len(X), 4 * STEPS):  # The last of three windows holds two batches of four.
        x, y = X[first : first + 4 * STEPS], Y[first : first + 4 * STEPS]
        weights = weights - RATE * 2 / len(x) * x.T @ (x @ weights - y)
        updated.append(weights)
    average, *rest = updated
    for weights in rest:
        average = MOMENTUM * average + (1 - MOMENTUM) * weights
    close(model.get_weights()[0], average)  # At the end of training, Keras replaces the weights by their averages.


def test_compile_accumulates_for_each_of_several_optimizers():
    optimizers = {
        "a": SGD(RATE, gradient_accumulation_steps=2),
        "rest": (lambda path: "b" in path.split("/")[0], SGD(RATE)),
    }
    model = hl.Model()
    model.a, model.b = built(layers.Dense(1, name="a")), built(layers.Dense(1, name="b"))
    compiled(model, optimizers)
    assert [type(part).__name__ for part in model.optimizer.values()] == ["GradientAccumulation", "SGD"]
    assert [len(owned) for owned in model.optimizer.owners().values()] == [2, 2]


def test_compile_keeps_predicates_under_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    low = layers.Dense(2, name="low")
    model = compiled(sequential(low, layers.Dense(1)), {"bottom": (lambda path: "low" in path, "sgd"), "*": "adam"})
    assert [type(part) for part in model.optimizer.values()] == [LossScaleOptimizer] * 2
    assert model.optimizer.owners()["bottom"] == low.trainable_variables


def test_compile_puts_loss_scaling_around_accumulation():
    keras.config.set_dtype_policy("mixed_float16")
    model = linear(hl.Model, SGD(RATE, gradient_accumulation_steps=2))
    assert isinstance(model.optimizer, LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, GradientAccumulation)


@pytest.mark.parametrize("inner", [lambda sgd: sgd, lambda sgd: NamedOptimizers({"*": sgd})])
@pytest.mark.parametrize("wrapper", [WeightAveraging, lambda inner: GradientTransforms(inner, [])])
def test_wrapper_around_keras_accumulation_is_refused(wrapper, inner):
    with pytest.raises(ValueError, match=r"single steps.*: GradientAccumulation\(.*HL328"):
        wrapper(inner(SGD(gradient_accumulation_steps=2)))


def test_minimize_refuses_keras_averages_with_accumulation():
    variable = keras.Variable(1.0)
    optimizer = SGD(use_ema=True, gradient_accumulation_steps=2)
    with pytest.raises(OptimizerError, match=r"GradientAccumulation\(optimizer, 2\).*HL313"):
        hl.minimize(lambda: variable * 1.0, variable, optimizer)


@pytest.mark.parametrize("cls", CUSTOM)
def test_explain_counts_the_updates_that_loss_scaling_skipped(cls, eagerly, capsys):
    model = linear(cls, LossScaleOptimizer(SGD(RATE), initial_scale=8.0))
    x = X.copy()
    x[[0, 17]] = np.inf  # In the first and in the second batch.
    fit(model, x, Y, batch_size=10)
    assert numpy(model.optimizer.skipped) == 2
    explanation = model.explain()
    assert "2 updates were skipped because a gradient was not finite. The loss scale is now 2." in explanation.notes
    assert explanation.owners[0].updates == 2
    assert "2 updates were skipped" in capsys.readouterr().out
