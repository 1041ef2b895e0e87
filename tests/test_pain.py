"""What goes wrong in silence when a step is written by hand for plain Keras, beside the same step here.

Each test shows Keras's number too: it is the reason for the library, and says when Keras no longer needs one. What goes
wrong when a run is stopped and goes on is in `resume/test_pain.py`.
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

EXAMPLES, BATCH, PENALTY, RATE = 80, 32, 0.1, 0.1

numbers = np.random.default_rng(0)
X = numbers.normal(size=(EXAMPLES, 3)).astype("float32")
Y = (X @ np.array([[1.0], [-2.0], [0.5]]) + 0.3 * numbers.normal(size=(EXAMPLES, 1))).astype("float32")
START = np.array([[0.5], [0.2], [-0.4]], "float32")


class OwnStep:
    """A step in Keras's words alone, by whatever name it reports its loss."""

    reported = "loss"

    def loss_of_batch(self, x, y, y_pred):
        return ops.mean((y_pred - y) ** 2)

    def train_step(self, data):
        x, y = data
        return {self.reported: self.minimize(lambda: self.loss_of_batch(x, y, self(x, training=True)))}


class OwnStepWithGradients(OwnStep):
    """The same with the gradients in hand. It says nothing of a loss scale."""

    def train_step(self, data):
        x, y = data
        loss, gradients = hl.value_and_grad(lambda: self.loss_of_batch(x, y, self(x, training=True)), wrt=self)()
        self.optimizer.apply(gradients, self.trainable_variables)
        return {self.reported: loss}


class InJAXsManner(OwnStep):
    """The same step as Keras asks for it on JAX: all state in, all state out."""

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


class InTensorFlowsManner(OwnStep):
    """The same step as Keras asks for it on TensorFlow."""

    def train_step(self, data):
        import tensorflow as tf  # noqa: PLC0415  Only where this step runs.

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of_batch(x, y, self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {self.reported: loss}


class InTorchsManner(OwnStep):
    """The same step as Keras asks for it on PyTorch."""

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


# The step that Keras's guides teach, on the backend at hand.
on_each_backend = pytest.mark.parametrize(
    "manner",
    [
        pytest.param(InJAXsManner, marks=pytest.mark.backend("jax")),
        pytest.param(InTensorFlowsManner, marks=pytest.mark.backend("tensorflow")),
        pytest.param(InTorchsManner, marks=pytest.mark.backend("torch")),
    ],
)
manners_that_need_no_state = pytest.mark.parametrize(
    "manner",
    [
        OwnStep,
        OwnStepWithGradients,
        pytest.param(InTensorFlowsManner, marks=pytest.mark.backend("tensorflow")),
        pytest.param(InTorchsManner, marks=pytest.mark.backend("torch")),
    ],
)


def linear(base, step, *, rate=RATE, regularizer=None, **attributes):
    """A linear model without bias, with this step, starting at START."""
    cls = type(step.__name__, (step, base), attributes)
    inputs = keras.Input((3,))
    model = cls(inputs, layers.Dense(1, use_bias=False, kernel_regularizer=regularizer)(inputs))
    model.set_weights([START])
    model.compile(keras.optimizers.SGD(rate), loss="mse")
    return model


def fitted(model, **options):
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(X, Y, **options).history


def mean_squared_error(weights):
    return np.mean((X @ weights - Y) ** 2)


def gradient_of_squared_error(weights):
    return 2 / EXAMPLES * X.T @ (X @ weights - Y)


# ------------------------------------------------------------- what is reported


@on_each_backend
def test_a_loss_that_a_step_returns_is_reported_where_keras_reports_zero(manner, eagerly):
    # At a rate of zero the epoch's mean is that over all examples, the last, smaller batch included.
    assert fitted(linear(keras.Model, manner, rate=0.0))["loss"] == [0.0]
    np.testing.assert_allclose(fitted(linear(hl.Model, OwnStep, rate=0.0))["loss"], [mean_squared_error(START)], 1e-5)


@on_each_backend
def test_a_loss_by_another_name_is_the_mean_of_the_epoch_where_keras_gives_its_last_batch(manner, eagerly):
    last = slice(EXAMPLES // BATCH * BATCH, None)
    of_last_batch = np.mean((X[last] @ START - Y[last]) ** 2)
    keras_model, model = (
        linear(base, step, rate=0.0, reported="error") for base, step in ((keras.Model, manner), (hl.Model, OwnStep))
    )
    np.testing.assert_allclose(fitted(keras_model)["error"], [of_last_batch], 1e-5)
    np.testing.assert_allclose(fitted(model)["error"], [mean_squared_error(START)], 1e-5)
    assert abs(of_last_batch - mean_squared_error(START)) > 0.1


@manners_that_need_no_state
def test_a_step_in_any_manner_reports_its_loss(manner, eagerly):
    history = fitted(linear(hl.Model, manner, rate=0.0), epochs=2)
    np.testing.assert_allclose(history["loss"], 2 * [mean_squared_error(START)], 1e-5)


def test_a_loop_over_all_metrics_reports_the_loss_beside_them(eagerly):
    class EveryMetric(hl.Model):
        def train_step(self, data):
            x, y = data

            def loss_fn():
                y_pred = self(x, training=True)
                return self.compute_loss(x, y, y_pred), y_pred

            loss, y_pred = self.minimize(loss_fn, has_aux=True)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss, sample_weight=len(x))
                else:
                    metric.update_state(y, y_pred)
            return {metric.name: metric.result() for metric in self.metrics}

    inputs = keras.Input((3,))
    model = EveryMetric(inputs, layers.Dense(1, use_bias=False)(inputs))
    model.set_weights([START])
    model.compile(keras.optimizers.SGD(0.0), loss="mse", metrics=["mae"])
    history = fitted(model, epochs=2)
    np.testing.assert_allclose(history["loss"], 2 * [mean_squared_error(START)], 1e-5)
    np.testing.assert_allclose(history["mae"], 2 * [np.mean(np.abs(X @ START - Y))], 1e-5)


# ----------------------------------------------------------------- regularizers


@on_each_backend
def test_a_regularizer_that_a_step_forgets_is_in_the_update_and_the_loss_where_keras_drops_it(manner, eagerly):
    options = {"regularizer": keras.regularizers.L2(PENALTY), "reported": "total"}
    keras_model, model = linear(keras.Model, manner, **options), linear(hl.Model, OwnStep, **options)
    keras_total, [total] = (fitted(made, batch_size=EXAMPLES)["total"] for made in (keras_model, model))
    without = gradient_of_squared_error(START)
    np.testing.assert_allclose(keras_model.get_weights()[0], START - RATE * without, 1e-4)
    np.testing.assert_allclose(keras_total, [mean_squared_error(START)], 1e-5)
    np.testing.assert_allclose(model.get_weights()[0], START - RATE * (without + 2 * PENALTY * START), 1e-4)
    np.testing.assert_allclose(total, mean_squared_error(START) + PENALTY * np.sum(START**2), 1e-5)


def by_compute_loss(self, x, y, y_pred):
    return self.compute_loss(x, y, y_pred)


def by_adding_losses(self, x, y, y_pred):
    return ops.mean((y_pred - y) ** 2) + sum(self.losses)


@pytest.mark.parametrize("loss_of_batch", [OwnStep.loss_of_batch, by_compute_loss, by_adding_losses])
def test_a_regularizer_counts_once_however_a_step_gets_at_it(loss_of_batch, eagerly):
    model = linear(hl.Model, OwnStep, regularizer=keras.regularizers.L2(PENALTY), loss_of_batch=loss_of_batch)
    [loss] = fitted(model, batch_size=EXAMPLES)["loss"]
    gradient = gradient_of_squared_error(START) + 2 * PENALTY * START
    np.testing.assert_allclose(model.get_weights()[0], START - RATE * gradient, 1e-4)
    np.testing.assert_allclose(loss, mean_squared_error(START) + PENALTY * np.sum(START**2), 1e-5)


@pytest.mark.backend("jax")
def test_compute_loss_with_a_regularizer_works_in_a_step_where_keras_on_jax_calls_none():
    options = {"regularizer": keras.regularizers.L2(PENALTY), "loss_of_batch": by_compute_loss}
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        fitted(linear(keras.Model, InJAXsManner, **options))
    history = fitted(linear(hl.Model, OwnStep, **options), epochs=5)
    assert history["loss"][-1] < history["loss"][0]


# ---------------------------------------------------------------- mixed float16


def half_precise(base, step, optimizer, policy="mixed_float16"):
    """A small network that computes in half precision."""
    start = np.random.default_rng(1)
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((3,))
    outputs = layers.Dense(1, dtype="float32")(layers.Dense(16, "tanh")(inputs))
    model = type("HalfPrecise", (step, base), {})(inputs, outputs)
    model.set_weights([start.normal(scale=0.5, size=weight.shape) for weight in model.get_weights()])
    model.compile(optimizer, loss="mse")
    return model


def learned_in_float16(base, step, optimizer=None, policy="mixed_float16"):
    """The error of a small network after some epochs under mixed float16."""
    model = half_precise(base, step, optimizer or keras.optimizers.SGD(RATE), policy)
    fitted(model, epochs=8)
    return np.mean((ops.convert_to_numpy(model(X)) - Y) ** 2)


class DefaultStep:
    """The step of the class it is mixed into."""


@on_each_backend
def test_a_step_that_forgets_the_loss_scale_learns_where_keras_divides_by_it_all_the_same(manner):
    by_default = learned_in_float16(keras.Model, DefaultStep)
    assert learned_in_float16(keras.Model, manner) > 5 * by_default
    np.testing.assert_allclose(learned_in_float16(hl.Model, OwnStep), by_default, rtol=0.05)


@manners_that_need_no_state
def test_a_step_in_any_manner_learns_as_the_default_step_does_in_float16(manner, eagerly):
    by_default = learned_in_float16(hl.Model, DefaultStep)
    assert by_default < 0.5 * np.var(Y)
    np.testing.assert_allclose(learned_in_float16(hl.Model, manner), by_default, rtol=0.05)


@pytest.mark.parametrize(
    ("policy", "make"),
    [
        ("mixed_float16", lambda: keras.optimizers.Adam(0.03)),
        ("mixed_bfloat16", lambda: keras.optimizers.SGD(RATE)),
    ],
    ids=["float16, Adam", "bfloat16, SGD"],
)
def test_an_own_step_learns_in_half_precision_as_keras_does_by_default(policy, make):
    by_default = learned_in_float16(keras.Model, DefaultStep, make(), policy)
    assert by_default < 0.5 * np.var(Y)
    np.testing.assert_allclose(learned_in_float16(hl.Model, OwnStep, make(), policy), by_default, rtol=0.05)


def test_in_bfloat16_no_loss_is_scaled():
    optimizer = keras.optimizers.SGD(RATE)
    assert half_precise(hl.Model, OwnStep, optimizer, "mixed_bfloat16").optimizer is optimizer


def test_an_own_step_that_overflows_is_skipped_to_the_bit_and_halves_the_scale():
    model = half_precise(hl.Model, OwnStep, keras.optimizers.Adam(0.03))
    fitted(model)
    before, optimizer = model.get_weights(), model.optimizer
    slots = [ops.convert_to_numpy(slot) for slot in optimizer.inner_optimizer.variables]
    scale, updates = float(optimizer.dynamic_scale), int(optimizer.iterations)
    model.fit(X[:BATCH], 1e30 * Y[:BATCH], batch_size=BATCH, verbose=0)
    for weight, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, weight)
    for slot, now in zip(slots, optimizer.inner_optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(now), slot)
    assert float(optimizer.dynamic_scale) == scale / 2
    fitted(model, batch_size=EXAMPLES)
    assert int(optimizer.iterations) == updates + 1
    assert np.any(model.get_weights()[0] != before[0])


# ----------------------------------------- optimizers, averages, and weights of examples


def number(variable):
    return float(ops.convert_to_numpy(variable))


def pulled(variables, by):
    """The gradients of a loss that pulls each variable by a constant."""
    return [ops.full(variable.shape, pull) for variable, pull in zip(variables, by, strict=True)]


def test_a_global_norm_is_that_of_all_where_keras_clips_each_optimizer_by_its_own():
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
    np.testing.assert_allclose([number(variable) for variable in variables], [-1.0, -1.0], rtol=1e-6)

    model = Two()
    by_name = {"left": keras.optimizers.SGD(1.0), "right": keras.optimizers.SGD(1.0)}
    model.compile(GradientTransforms(by_name, [ClipByGlobalNorm(1.0)]))
    model.fit(X[:1], verbose=0)
    np.testing.assert_allclose([number(model.left), number(model.right)], [-0.6, -0.8], rtol=1e-6)


def test_averages_count_updates_where_keras_counts_the_steps_that_only_accumulate(eagerly):
    def averaged(weights, start):
        for weight in weights:
            start = 0.9 * start + 0.1 * weight
        return start

    after_updates = [9.0, 8.0, 7.0, 6.0]  # One down by each update of four gradients of one.
    of_updates = averaged(after_updates[1:], start=9.0)
    of_steps = averaged([9, 9, 9, 8, 8, 8, 8, 7, 7, 7, 7, 6], start=9.0)
    assert [round(average, 3) for average in (of_updates, of_steps)] == [8.439, 7.878]

    weight = keras.Variable(10.0)
    options = {"use_ema": True, "ema_momentum": 0.9, "gradient_accumulation_steps": 4}
    optimizer = keras.optimizers.SGD(1.0, **options)
    for _ in range(16):
        optimizer.apply(pulled([weight], by=[1.0]), [weight])
    assert number(weight) == 6.0
    optimizer.finalize_variable_values([weight])
    np.testing.assert_allclose(number(weight), of_steps, rtol=1e-5)

    weight, optimizer = keras.Variable(10.0), GradientAccumulation(WeightAveraging(keras.optimizers.SGD(1.0), 0.9), 4)
    step = hl.function(lambda: hl.minimize(lambda: weight + 0.0, weight, optimizer))
    for _ in range(16):
        step()
    assert number(weight) == 6.0
    with averaged_weights(optimizer):
        np.testing.assert_allclose(number(weight), of_updates, rtol=1e-6)


OFF = np.array([[0.0], [0.0], [0.0], [4.0]], "float32")
ONLY_THE_LAST = np.array([0.0, 0.0, 0.0, 1.0], "float32")


def evaluated(base, loss):
    """The one error of four examples, of which the last alone has a weight, as it is reported."""
    inputs = keras.Input((1,))
    model = base(inputs, layers.Identity()(inputs))
    model.compile(loss=loss, metrics=["mae"], weighted_metrics=[keras.metrics.MeanAbsoluteError(name="weighted")])
    found = model.evaluate(OFF, np.zeros_like(OFF), sample_weight=ONLY_THE_LAST, return_dict=True, verbose=0)
    return model, [found[name] for name in ("loss", "weighted", "mae")]


def test_one_error_is_reported_three_ways_as_in_keras_and_it_is_said_why():
    model, found = evaluated(hl.Model, "mae")
    assert found == evaluated(keras.Model, "mae")[1] == [1.0, 4.0, 1.0]
    [why] = model.explain().notes
    assert "divided by the number of examples" in why
    assert "reduction='mean_with_sample_weight'" in why


def test_a_loss_divided_by_its_weights_is_the_weighted_metric():
    loss = keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")
    model, found = evaluated(hl.Model, loss)
    assert found == [4.0, 4.0, 1.0]
    assert model.explain().notes == ()


# ------------------------------------------------------- optimizers that take turns


def test_optimizers_take_turns_where_keras_wants_gradients_for_all_variables():
    class Two(hl.Model):
        def __init__(self):
            super().__init__()
            self.left, self.right = layers.Dense(1, use_bias=False), layers.Dense(1, use_bias=False)

        def train_step(self, data):
            x, y = data
            left = self.minimize(lambda: ops.mean((self.left(x) - y) ** 2), wrt=self.left)
            right = self.minimize(lambda: ops.mean((self.right(x) - y) ** 2), wrt=self.right)
            return {"left": left, "right": right}

    model = Two()
    model.left.build((None, 3))
    model.right.build((None, 3))
    model.set_weights([START, START])
    keras_optimizer = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD(RATE))
    keras_optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="Gradients must match trainable variables one-to-one"):
        keras_optimizer.apply([ops.ones((3, 1))], model.left.trainable_variables)

    model.compile(optimizer={"left": keras.optimizers.SGD(RATE), "right": keras.optimizers.SGD(2 * RATE)})
    fitted(model, batch_size=EXAMPLES)
    for layer, rate in ((model.left, RATE), (model.right, 2 * RATE)):
        expected = START - rate * gradient_of_squared_error(START)
        np.testing.assert_allclose(ops.convert_to_numpy(layer.kernel), expected, 1e-4)


# ------------------------------------------------------------- training or not


class Normalized:
    """Its `call` does not say whether it trains."""

    def __init__(self):
        super().__init__()
        self.normalization, self.out = layers.BatchNormalization(momentum=0.75), layers.Dense(1)

    def call(self, x):
        return self.out(self.normalization(x))


def trained_once(base):
    model = type("Net", (Normalized, base), {})()
    model.compile("sgd", "mse")
    model.fit(X, Y, batch_size=EXAMPLES, verbose=0)
    return model


def test_layers_inside_know_that_they_are_trained_where_keras_tells_a_call_that_asks_alone():
    known = ops.convert_to_numpy(trained_once(keras.Model).normalization.moving_mean)
    np.testing.assert_array_equal(known, np.zeros(3))
    model = trained_once(hl.Model)
    moving_mean = ops.convert_to_numpy(model.normalization.moving_mean)
    np.testing.assert_allclose(moving_mean, 0.25 * X.mean(axis=0), rtol=1e-5, atol=1e-7)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.normalization.moving_mean), moving_mean)
