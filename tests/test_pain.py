"""Silent errors of a step written by hand for plain Keras, beside the same step here.

Each test also shows Keras's number: it is the reason for the library, and tells when Keras no longer needs one. The
errors of a stopped and resumed run are in `resume/test_pain.py`.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.optimizers import (
    ClipByGlobalNorm,
    GradientAccumulation,
    GradientTransforms,
    WeightAveraging,
    averaged_weights,
)
from tests.models import fit, functional
from tests.numbers import close, same

EXAMPLES, BATCH, PENALTY, RATE = 80, 32, 0.1, 0.1

numbers = np.random.default_rng(0)
X = numbers.normal(size=(EXAMPLES, 3)).astype("float32")
Y = (X @ np.array([[1.0], [-2.0], [0.5]]) + 0.3 * numbers.normal(size=(EXAMPLES, 1))).astype("float32")
START = np.array([[0.5], [0.2], [-0.4]], "float32")


class CustomStep:
    """A step that names no backend; it reports its loss under any name."""

    reported = "loss"

    def loss_of_batch(self, x, y, y_pred):
        return ops.mean((y_pred - y) ** 2)

    def train_step(self, data):
        x, y = data
        return {self.reported: self.minimize(lambda: self.loss_of_batch(x, y, self(x, training=True)))}


class StepWithGradients(CustomStep):
    """The same with the gradients at hand. It ignores the loss scale."""

    def train_step(self, data):
        x, y = data
        loss, gradients = hl.value_and_grad(lambda: self.loss_of_batch(x, y, self(x, training=True)), wrt=self)()
        self.optimizer.apply(gradients, self.trainable_variables)
        return {self.reported: loss}


class JAXStep(CustomStep):
    """The same step in Keras's own manner on JAX: all state in, all state out."""

    def train_step(self, state, data):
        import jax  # noqa: PLC0415  Only where this step runs.

        weights, others, slots, metrics = state
        x, y = data

        def loss_fn(weights):
            y_pred, updated = self.stateless_call(weights, others, x, training=True)
            return self.loss_of_batch(x, y, y_pred), updated

        (loss, others), gradients = jax.value_and_grad(loss_fn, has_aux=True)(weights)
        weights, slots = self.optimizer.stateless_apply(slots, gradients, weights)
        return {self.reported: loss}, (weights, others, slots, metrics)


class TensorFlowStep(CustomStep):
    """The same step in Keras's own manner on TensorFlow."""

    def train_step(self, data):
        import tensorflow as tf  # noqa: PLC0415  Only where this step runs.

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of_batch(x, y, self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {self.reported: loss}


class TorchStep(CustomStep):
    """The same step in Keras's own manner on PyTorch."""

    def train_step(self, data):
        import torch  # noqa: PLC0415  Only where this step runs.

        x, y = data
        self.zero_grad()
        loss = self.loss_of_batch(x, y, self(x, training=True))
        loss.backward()
        with torch.no_grad():
            gradients = [variable.value.grad for variable in self.trainable_variables]
            self.optimizer.apply(gradients, self.trainable_variables)
        return {self.reported: loss}


# The step that Keras's guides teach for the backend of this process.
KERAS_STEP = {"jax": JAXStep, "tensorflow": TensorFlowStep, "torch": TorchStep}[keras.backend.backend()]
each_step = pytest.mark.parametrize(
    "step", [CustomStep, StepWithGradients, *([] if KERAS_STEP is JAXStep else [KERAS_STEP])]
)


def linear(base, step, rate=RATE, regularizer=None, **attributes):
    """A linear model without a bias, with this step, that starts at START."""
    layer = layers.Dense(1, use_bias=False, kernel_regularizer=regularizer)
    model = functional(layer, cls=type(step.__name__, (step, base), attributes))
    model.set_weights([START])
    model.compile(keras.optimizers.SGD(rate), loss="mse")
    return model


def fitted(model, **options):
    return fit(model, X, Y, **({"batch_size": BATCH} | options))


def mean_squared_error(weights):
    return np.mean((X @ weights - Y) ** 2)


def gradient_of_squared_error(weights):
    return 2 / EXAMPLES * X.T @ (X @ weights - Y)


# ------------------------------------------------------------- reported values


def test_fit_reports_a_returned_loss_where_keras_reports_zero(eagerly):
    # At a rate of zero the mean of the epoch is that over all examples, the last, smaller batch included.
    assert fitted(linear(keras.Model, KERAS_STEP, rate=0.0))["loss"] == [0.0]
    close(fitted(linear(hl.Model, CustomStep, rate=0.0))["loss"], [mean_squared_error(START)])


def test_fit_averages_a_loss_of_another_name_where_keras_reports_the_last_batch(eagerly):
    last = slice(EXAMPLES // BATCH * BATCH, None)
    of_last_batch = np.mean((X[last] @ START - Y[last]) ** 2)
    close(fitted(linear(keras.Model, KERAS_STEP, rate=0.0, reported="error"))["error"], [of_last_batch])
    of_epoch = mean_squared_error(START)
    close(fitted(linear(hl.Model, CustomStep, rate=0.0, reported="error"))["error"], [of_epoch])
    assert abs(of_last_batch - of_epoch) > 0.1


@each_step
def test_fit_reports_the_loss_of_a_step_in_any_manner(step, eagerly):
    close(fitted(linear(hl.Model, step, rate=0.0), epochs=2)["loss"], 2 * [mean_squared_error(START)])


# ----------------------------------------------------------------- regularizers


def test_minimize_adds_a_regularizer_where_keras_drops_it(eagerly):
    options = {"regularizer": keras.regularizers.L2(PENALTY), "reported": "total"}
    keras_model, model = linear(keras.Model, KERAS_STEP, **options), linear(hl.Model, CustomStep, **options)
    keras_total, total = (fitted(each, batch_size=EXAMPLES)["total"] for each in (keras_model, model))
    without = gradient_of_squared_error(START)
    close(keras_model.get_weights()[0], START - RATE * without, rtol=1e-4)
    close(keras_total, [mean_squared_error(START)])
    close(model.get_weights()[0], START - RATE * (without + 2 * PENALTY * START), rtol=1e-4)
    close(total, [mean_squared_error(START) + PENALTY * np.sum(START**2)])


@pytest.mark.backend("jax")
def test_compute_loss_with_a_regularizer_works_in_a_step_where_keras_on_jax_calls_none():
    def by_compute_loss(self, x, y, y_pred):
        return self.compute_loss(x, y, y_pred)

    options = {"regularizer": keras.regularizers.L2(PENALTY), "loss_of_batch": by_compute_loss}
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        fitted(linear(keras.Model, JAXStep, **options))
    history = fitted(linear(hl.Model, CustomStep, **options), epochs=5)
    assert history["loss"][-1] < history["loss"][0]


# --------------------------------------------------------------- half precision


def learned_in_half_precision(base, step, optimizer=None, policy="mixed_float16"):
    """The error of a small network after some epochs."""
    start, optimizer = np.random.default_rng(1), optimizer or keras.optimizers.SGD(RATE)
    keras.config.set_dtype_policy(policy)
    cls = type("HalfPrecise", (step, base), {})
    model = functional(layers.Dense(16, "tanh"), layers.Dense(1, dtype="float32"), cls=cls)
    model.set_weights([start.normal(scale=0.5, size=weight.shape) for weight in model.get_weights()])
    model.compile(optimizer, loss="mse")
    assert base is keras.Model or policy == "mixed_float16" or model.optimizer is optimizer  # No loss is scaled.
    fitted(model, epochs=8)
    return np.mean((ops.convert_to_numpy(model(X)) - Y) ** 2)


class DefaultStep:
    """The step of the class that it is mixed into."""


@each_step
def test_fit_in_float16_learns_without_a_loss_scale_in_the_step_where_keras_divides_by_it(step, eagerly):
    by_default = learned_in_half_precision(keras.Model, DefaultStep)
    assert by_default < 0.5 * np.var(Y)
    assert learned_in_half_precision(keras.Model, KERAS_STEP) > 5 * by_default
    close(learned_in_half_precision(hl.Model, step), by_default, rtol=0.05)


@pytest.mark.parametrize(
    ("policy", "make"),
    [
        ("mixed_float16", lambda: keras.optimizers.Adam(0.03)),
        ("mixed_bfloat16", lambda: keras.optimizers.SGD(RATE)),
    ],
    ids=["float16, Adam", "bfloat16, SGD"],
)
def test_fit_with_a_custom_step_learns_in_half_precision_as_keras_does_by_default(policy, make):
    by_default = learned_in_half_precision(keras.Model, DefaultStep, make(), policy)
    assert by_default < 0.5 * np.var(Y)
    close(learned_in_half_precision(hl.Model, CustomStep, make(), policy), by_default, rtol=0.05)


# ----------------------------------------- optimizers, averages, and weights of examples


def pulled(variables, by):
    """The gradients of a loss that pulls each variable by a constant."""
    return [ops.full(variable.shape, pull) for variable, pull in zip(variables, by, strict=True)]


def test_clip_by_global_norm_is_over_all_optimizers_where_keras_clips_each_by_its_own():
    class Two(hl.Model):
        def __init__(self):
            super().__init__()
            self.left, self.right = keras.Variable(0.0, name="left"), keras.Variable(0.0, name="right")

        def train_step(self, data):
            return {"loss": self.minimize(lambda: 3 * self.left + 4 * self.right)}

    variables = [keras.Variable(0.0), keras.Variable(0.0)]
    clipping = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD(1.0, global_clipnorm=1.0))
    clipping.build(variables)
    clipping.apply(pulled(variables, by=(3.0, 4.0)), variables)
    close(variables, [-1.0, -1.0])

    model = Two()
    by_name = {"left": keras.optimizers.SGD(1.0), "right": keras.optimizers.SGD(1.0)}
    model.compile(GradientTransforms(by_name, [ClipByGlobalNorm(1.0)]))
    model.fit(X[:1], verbose=0)
    close([model.left, model.right], [-0.6, -0.8])


def test_weight_averaging_counts_updates_where_keras_counts_the_steps_that_only_accumulate(eagerly):
    def averaged(weights, start):
        for weight in weights:
            start = 0.9 * start + 0.1 * weight
        return start

    # Each update by four gradients of one takes one off.
    of_updates = averaged([8, 7, 6], start=9.0)
    of_steps = averaged([9, 9, 9, 8, 8, 8, 8, 7, 7, 7, 7, 6], start=9.0)
    close([of_updates, of_steps], [8.439, 7.878], rtol=1e-4)

    weight = keras.Variable(10.0)
    options = {"use_ema": True, "ema_momentum": 0.9, "gradient_accumulation_steps": 4}
    optimizer = keras.optimizers.SGD(1.0, **options)
    for _ in range(16):
        optimizer.apply(pulled([weight], by=[1.0]), [weight])
    close(weight, 6)
    optimizer.finalize_variable_values([weight])
    close(weight, of_steps)

    weight, optimizer = keras.Variable(10.0), GradientAccumulation(WeightAveraging(keras.optimizers.SGD(1.0), 0.9), 4)
    step = hl.function(lambda: hl.minimize(lambda: weight + 0.0, weight, optimizer))
    for _ in range(16):
        step()
    close(weight, 6)
    with averaged_weights(optimizer):
        close(weight, of_updates)


def evaluated(base, loss):
    """The reported error of four examples of which only the last has a weight."""
    off, weight = np.array([[0.0], [0.0], [0.0], [4.0]], "float32"), np.array([0.0, 0.0, 0.0, 1.0], "float32")
    model = functional(layers.Identity(), inputs=1, cls=base)
    model.compile(loss=loss, metrics=["mae"], weighted_metrics=[keras.metrics.MeanAbsoluteError(name="weighted")])
    found = model.evaluate(off, np.zeros_like(off), sample_weight=weight, return_dict=True, verbose=0)
    return model, [found[name] for name in ("loss", "weighted", "mae")]


def test_explain_says_why_one_error_is_reported_three_ways_as_in_keras():
    model, found = evaluated(hl.Model, "mae")
    assert found == evaluated(keras.Model, "mae")[1] == [1.0, 4.0, 1.0]
    [why] = model.explain().notes
    assert "divided by the number of examples" in why
    assert "reduction='mean_with_sample_weight'" in why
    model, found = evaluated(hl.Model, keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight"))
    assert found == [4.0, 4.0, 1.0]
    assert model.explain().notes == ()


# ------------------------------------------------------------- the training flag


def test_fit_passes_training_to_inner_layers_where_keras_passes_it_only_to_a_call_that_takes_it():
    moving_means = []
    for base in (keras.Model, hl.Model):

        class WithoutFlag(base):
            """A `call` without `training`."""

            def call(self, x):
                return self.out(self.normalization(x))

        model = WithoutFlag()
        model.normalization, model.out = layers.BatchNormalization(momentum=0.75), layers.Dense(1)
        model.compile("sgd", "mse")
        fitted(model, batch_size=EXAMPLES)
        moving_means.append(model.normalization.moving_mean.numpy())
    same(moving_means[0], np.zeros(3))
    close(moving_means[1], 0.25 * X.mean(axis=0))
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    same(model.normalization.moving_mean, moving_means[1])
