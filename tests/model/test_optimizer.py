"""What `compile` makes of optimizers, and what is said of those used without it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import OptimizerError
from handloom.optimizers import (
    GradientAccumulation,
    GradientTransforms,
    LossScaleOptimizer,
    NamedOptimizers,
    WeightAveraging,
)

numbers = np.random.default_rng(0)
X = numbers.normal(size=(40, 3)).astype("float32")
Y = numbers.normal(size=(40, 1)).astype("float32")
START = np.array([[0.5], [0.2], [-0.4]], "float32")
RATE, STEPS, MOMENTUM = 0.1, 4, 0.9


class OwnStep(hl.Model):
    def train_step(self, data):
        x, y = data
        return {"error": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))}


class OwnStepWithGradients(hl.Model):
    def train_step(self, data):
        x, y = data
        loss, gradients = hl.value_and_grad(lambda: ops.mean((self(x, training=True) - y) ** 2), wrt=self)()
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"error": loss}


every_step = pytest.mark.parametrize("cls", [hl.Model, OwnStep, OwnStepWithGradients])


def linear(cls, optimizer):
    inputs = keras.Input((3,))
    model = cls(inputs, layers.Dense(1, use_bias=False)(inputs))
    model.set_weights([START])
    model.compile(optimizer, loss="mse")
    return model


def after_big_batches():
    """The weights after each update from four batches of four; the last of three windows holds two of them."""
    weights, passed = START, []
    for first in range(0, len(X), 4 * STEPS):
        x, y = X[first : first + 4 * STEPS], Y[first : first + 4 * STEPS]
        weights = weights - RATE * 2 / len(x) * x.T @ (x @ weights - y)
        passed.append(weights)
    return passed


@every_step
def test_keras_own_accumulation_equals_the_big_batch_and_updates_from_a_short_window(cls, eagerly):
    model = linear(cls, keras.optimizers.SGD(RATE, gradient_accumulation_steps=STEPS))
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], after_big_batches()[-1], rtol=1e-5, atol=1e-6)


@every_step
def test_keras_own_averages_move_on_updates_alone(cls, eagerly):
    options = {"use_ema": True, "ema_momentum": MOMENTUM, "gradient_accumulation_steps": STEPS}
    model = linear(cls, keras.optimizers.SGD(RATE, **options))
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    average, *rest = after_big_batches()
    for weights in rest:
        average = MOMENTUM * average + (1 - MOMENTUM) * weights
    # At the end of training Keras puts the average in the place of the weights.
    np.testing.assert_allclose(model.get_weights()[0], average, rtol=1e-5, atol=1e-6)


def test_each_of_several_optimizers_accumulates_for_itself():
    optimizers = {
        "a": keras.optimizers.SGD(RATE, gradient_accumulation_steps=2),
        "rest": (lambda path: "b" in path.split("/")[0], keras.optimizers.SGD(RATE)),
    }
    model = hl.Model()
    model.a, model.b = layers.Dense(1, name="a"), layers.Dense(1, name="b")
    model.a.build((None, 3))
    model.b.build((None, 3))
    model.compile(optimizers)
    assert [type(part).__name__ for part in model.optimizer.values()] == ["GradientAccumulation", "SGD"]
    assert [len(owned) for owned in model.optimizer.owners().values()] == [2, 2]


def test_predicates_survive_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    model = hl.Sequential([keras.Input((3,)), layers.Dense(2, name="low"), layers.Dense(1, name="high")])
    model.compile({"bottom": (lambda path: "low" in path, "sgd"), "*": "adam"}, loss="mse")
    assert [type(part) for part in model.optimizer.values()] == [LossScaleOptimizer] * 2
    assert [variable.name for variable in model.optimizer.owners()["bottom"]] == ["kernel", "bias"]
    assert model.optimizer.owners()["bottom"] == model.layers[0].trainable_variables


def test_scaling_goes_around_accumulation():
    keras.config.set_dtype_policy("mixed_float16")
    model = linear(hl.Model, keras.optimizers.SGD(RATE, gradient_accumulation_steps=2))
    assert isinstance(model.optimizer, LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, GradientAccumulation)


@pytest.mark.parametrize("wrapper", [WeightAveraging, lambda inner: GradientTransforms(inner, [])])
def test_a_wrapper_that_would_see_single_steps_is_refused(wrapper):
    with pytest.raises(ValueError, match=r"around SGD\(gradient_accumulation_steps=2\).*: GradientAccumulation\("):
        wrapper(keras.optimizers.SGD(gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="single steps"):
        wrapper(NamedOptimizers({"*": keras.optimizers.SGD(gradient_accumulation_steps=2)}))


def test_without_compile_keras_own_averages_with_accumulation_are_an_error():
    variable = keras.Variable(1.0)
    optimizer = keras.optimizers.SGD(use_ema=True, gradient_accumulation_steps=2)
    with pytest.raises(
        OptimizerError, match=r"averages on steps that update nothing.*GradientAccumulation\(optimizer, 2\)"
    ):
        hl.minimize(lambda: variable * 1.0, variable, optimizer)


@pytest.mark.parametrize("cls", [OwnStep, OwnStepWithGradients])
def test_skipped_updates_are_counted_and_told(cls, eagerly, capsys):
    model = linear(cls, LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=8.0))
    x = X.copy()
    x[[0, 17]] = np.inf  # In the first and in the second batch.
    model.fit(x, Y, batch_size=10, shuffle=False, verbose=0)
    assert int(ops.convert_to_numpy(model.optimizer.skipped.value)) == 2
    explanation = model.explain()
    assert "2 updates were skipped: a gradient was not finite. The loss scale is 2 now." in explanation.notes
    assert explanation.owners[0].updates == 2
    assert "2 updates were skipped" in capsys.readouterr().out
