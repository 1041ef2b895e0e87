"""Rows C1 to C4, C7 and C8: custom losses, activations, metrics and optimizers; `test_c_layers.py` has the layers."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._keras import layers_of
from tests.models import built
from tests.numbers import close, numpy
from tests.resume.runs import left
from tests.resume.stopped import StopAt, Stopped
from tests.rows import by_numpy, curves
from tests.rows.components import (
    BATCH,
    IN_EACH_WAY,
    assert_trains_as_in_numpy,
    assert_trains_on_exactly,
    functional,
    metric_ways,
    registered,
    subclassed,
    ways,
)
from tests.rows.figures import below
from tests.rows.real_data import diabetes

RATE = 0.1
X, Y = diabetes()


def linear():
    return layers.Dense(1, use_bias=False, kernel_initializer="zeros")


ZEROS = np.zeros((10, 1))


# ------------------------------------------------------------------- C1, Huber loss


def huber(y, y_pred, threshold=1.0):
    error = ops.abs(y - y_pred)
    large = threshold * (error - threshold / 2)
    return ops.mean(ops.where(error <= threshold, error**2 / 2, large), axis=-1)


def create_huber(threshold):
    def huber_with_threshold(y, y_pred):
        return huber(y, y_pred, threshold)

    return huber_with_threshold


@registered
class HuberLoss(keras.Loss):
    def __init__(self, threshold=1.0, **options):
        super().__init__(**options)
        self.threshold = threshold

    def call(self, y, y_pred):
        return huber(y, y_pred, self.threshold)

    def get_config(self):
        return super().get_config() | {"threshold": self.threshold}


def huber_in_numpy(error, threshold):
    error = np.abs(error)
    return np.where(error <= threshold, error**2 / 2, threshold * (error - threshold / 2))


HUBERS = {"function": (huber, 1.0), "factory": (create_huber(0.5), 0.5), "class": (HuberLoss(2.0), 2.0)}
OFF = np.array([[0.25], [1.5], [-3.0], [-0.5]], "float32")
WEIGHT = np.array([1.0, 0.0, 2.0, 0.5], "float32")


@pytest.mark.parametrize("form", HUBERS)
def test_c1_a_loss_function_and_class_give_the_values_of_numpy_by_example(form, eagerly):
    loss, threshold = HUBERS[form]
    loss = HuberLoss(threshold, reduction=None) if form == "class" else loss
    close(hl.function(loss)(np.zeros_like(OFF), OFF), huber_in_numpy(OFF, threshold)[:, 0])


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
def test_c1_a_loss_class_has_every_reduction(weight, eagerly, shown):
    of_example = huber_in_numpy(OFF, 2.0)[:, 0] * (1 if weight is None else weight)
    expected = {
        **dict.fromkeys((None, "none"), of_example),
        "sum": of_example.sum(),
        **dict.fromkeys(("mean", "sum_over_batch_size"), of_example.mean()),
        "mean_with_sample_weight": of_example.sum() / (4 if weight is None else weight.sum()),
    }
    for reduction, right in expected.items():
        loss = functools.partial(HuberLoss(2.0, reduction=reduction), sample_weight=weight)
        close(hl.function(loss)(np.zeros_like(OFF), OFF), right)
    shown(f"{len(expected)} reductions as in NumPy")


@ways
@pytest.mark.parametrize("form", HUBERS)
def test_c1_a_loss_trains_as_in_numpy_with_sample_weights(form, way, shown):
    loss, threshold = HUBERS[form]
    weight = np.random.default_rng(0).uniform(0, 2, 442).astype("float32")

    def update(weights, x, y, weight):
        off = x @ weights[0] - y
        slope = np.clip(off, -threshold, threshold) * weight[:, None] / len(x)
        return by_numpy.descended(weights, [x.T @ slope], RATE), weight * huber_in_numpy(off, threshold)[:, 0]

    used = way([linear()], X, keras.optimizers.SGD(RATE), loss)
    losses, _ = assert_trains_as_in_numpy(used, (X, Y, weight), update, [ZEROS])
    shown(f"weighted loss {losses[-1]:.3f} as in NumPy, {IN_EACH_WAY}")


@pytest.mark.parametrize("build", [functional, subclassed])
def test_c1_a_loss_class_keeps_its_threshold_when_saved(build, tmp_path, shown):
    loaded = build([linear()], X, loss=HuberLoss(0.25)).reloaded(tmp_path).net
    assert loaded.loss.threshold == 0.25
    close(loaded.evaluate(X, Y, verbose=0), huber_in_numpy(Y, 0.25).mean())
    shown(f"threshold {loaded.loss.threshold} after loading")


# ---------------------------- C2, activation, initializer, regularizer, constraint


@registered
def leaky(z):
    return ops.where(z > 0, z, 0.1 * z)


@registered
def ramp(shape, dtype=None):
    return ops.reshape(ops.linspace(-0.4, 0.4, shape[0] * shape[1], dtype=dtype), shape)


@registered
def squared(weights):
    return 0.05 * ops.sum(weights**2)


@registered
def at_least_zero(weights):
    return ops.maximum(weights, 0.0)


class Configured:
    """Has one number, which its config holds."""

    def __init__(self, number):
        self.number = number

    def get_config(self):
        return {"number": self.number}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@registered
class Leaky(Configured):
    def __call__(self, z):
        return ops.where(z > 0, z, self.number * z)


@registered
class Ramp(Configured, keras.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.reshape(ops.linspace(-self.number, self.number, shape[0] * shape[1], dtype=dtype), shape)


@registered
class Squared(Configured, keras.Regularizer):
    def __call__(self, weights):
        return self.number * ops.sum(weights**2)


@registered
class AtLeast(Configured, keras.constraints.Constraint):
    def __call__(self, weights):
        return ops.maximum(weights, self.number)


PARTS = {
    "functions": ((leaky, ramp, squared, at_least_zero), (0.1, 0.4, 0.05, 0.0)),
    "classes": ((Leaky(0.2), Ramp(0.3), Squared(0.1), AtLeast(-0.1)), (0.2, 0.3, 0.1, -0.1)),
}
NAMES = ("activation", "kernel_initializer", "kernel_regularizer", "kernel_constraint")


def layer_of(parts):
    return layers.Dense(1, use_bias=False, **dict(zip(NAMES, parts, strict=True)))


@ways
@pytest.mark.parametrize("form", PARTS)
def test_c2_custom_arguments_of_dense_train_as_in_numpy(form, way, shown):
    parts, (leak, steep, penalty, least) = PARTS[form]

    def update(weights, x, y):
        [kernel] = weights
        before = x @ kernel
        off = np.where(before > 0, before, leak * before) - y
        slope = 2 * off * np.where(before > 0, 1, leak) / len(x)
        moved = kernel - RATE * (x.T @ slope + 2 * penalty * kernel)
        return [np.maximum(moved, least)], off[:, 0] ** 2 + penalty * (kernel**2).sum()

    used, start = way([layer_of(parts)], X, keras.optimizers.SGD(RATE)), np.linspace(-steep, steep, 10)[:, None]
    losses, [kernel] = assert_trains_as_in_numpy(used, (X, Y), update, [start])
    assert (kernel == least).any()  # The constraint had something to do.
    shown(f"loss {losses[-1]:.3f} as in NumPy, {IN_EACH_WAY}")


@ways
@pytest.mark.parametrize("form", PARTS)
def test_c2_custom_arguments_of_dense_survive_saving(form, way, tmp_path, shown):
    parts, numbers = PARTS[form]
    loaded = assert_trains_on_exactly(way([layer_of(parts)], X), (X, Y), tmp_path)
    [layer] = [layer for layer in layers_of(loaded.net) if isinstance(layer, layers.Dense)]
    found = tuple(getattr(layer, name) for name in NAMES)
    if form == "classes":
        assert [type(part) for part in found] == [Leaky, Ramp, Squared, AtLeast]
        assert tuple(part.number for part in found) == numbers
    else:
        assert found == parts
    shown("trains on after loading, bitwise identical")


# -------------------------------------------------------------- C3, streaming precision


@registered
class StreamingPrecision(keras.Metric):
    """Right positives among all positives since the reset."""

    def __init__(self, name="streaming_precision", **options):
        super().__init__(name=name, **options)
        self.true_positives = self.add_variable((), "zeros", name="true_positives")
        self.false_positives = self.add_variable((), "zeros", name="false_positives")

    def update_state(self, y, y_pred, sample_weight=None):
        positive = ops.cast(y_pred > 0.5, "float32")
        self.true_positives.assign_add(ops.sum(positive * y))
        self.false_positives.assign_add(ops.sum(positive * (1 - y)))

    def result(self):
        return self.true_positives / (self.true_positives + self.false_positives)


# The example of the handbook: 4 of 5 positives are right, then none of 3.
TRUTH = np.array([[0, 1, 1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0, 1, 1]], "float32")
GUESS = np.array([[1, 1, 0, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0, 0, 0]], "float32")
precisions = pytest.mark.parametrize(
    "make",
    [StreamingPrecision, lambda: keras.metrics.Precision(name="streaming_precision")],
    ids=["custom", "Keras's"],
)


@precisions
def test_c3_a_metric_in_a_function_streams_and_is_reset(make, eagerly, shown):
    precision = make()

    def counts():
        return [numpy(count).sum() for count in (precision.true_positives, precision.false_positives)]

    @hl.function
    def step(truth, guess):
        precision.update_state(truth, guess)
        return precision.result()

    for _ in range(2):
        first, second = (float(step(*batch)) for batch in zip(TRUTH, GUESS, strict=True))
        close([first, second], [0.8, 0.5])
        found = counts()
        assert found == [4, 4]
        precision.reset_state()
        assert counts() == [0, 0]
    shown(f"{first:.1f} then {second:.1f}; TP {found[0]:.0f} and FP {found[1]:.0f}")


@metric_ways
@precisions
def test_c3_a_metric_streams_over_batches_and_is_reset_each_epoch(make, measure, shown):
    seen = measure(make(), TRUTH.reshape(16, 1), GUESS.reshape(16, 1), batch_size=8, epochs=2)
    close(seen, [0.8, 0.5, 0.8, 0.5])
    shown(f"the same {IN_EACH_WAY}")


def share_off(y, y_pred):
    """A metric that is a function: for each example, the share of outputs that are off by more than a half."""
    return ops.mean(ops.cast(ops.abs(y - y_pred) > 0.5, "float32"), axis=-1)


@metric_ways
def test_c3_a_metric_that_is_a_function_is_the_mean_over_examples(measure):
    seen = measure(share_off, TRUTH.reshape(16, 1), GUESS.reshape(16, 1), batch_size=5, epochs=1)
    close(seen[-1], np.mean(GUESS != TRUTH))


# --------------------------------------------------------------------- C4, Huber metric


@registered
class HuberMetric(keras.Metric):
    """The mean of the Huber loss over examples."""

    def __init__(self, threshold=1.0, name="huber", **options):
        super().__init__(name=name, **options)
        self.threshold = threshold
        self.total, self.examples = (self.add_variable((), "zeros", name=name) for name in ("total", "examples"))

    def update_state(self, y, y_pred, sample_weight=None):
        self.total.assign_add(ops.sum(huber(y, y_pred, self.threshold)))
        self.examples.assign_add(ops.cast(ops.shape(y)[0], "float32"))

    def result(self):
        return self.total / self.examples

    def get_config(self):
        return super().get_config() | {"threshold": self.threshold}


# Batches of 4 and of 1, so that the mean of the batch means differs.
ERRORS = np.array([[0.5], [1.0], [0.0], [-1.5], [8.0]], "float32")


@metric_ways
def test_c4_a_metric_with_a_threshold_is_the_mean_over_examples_and_not_over_batches(measure, shown):
    seen = measure(HuberMetric(2.0), ERRORS, np.zeros_like(ERRORS), batch_size=4, epochs=2)
    of_examples = huber_in_numpy(ERRORS, 2.0)
    close(seen, 2 * [of_examples[:4].mean(), of_examples.mean()])
    of_batches = np.mean([of_examples[:4].mean(), of_examples[4:].mean()])
    assert of_batches > 2 * of_examples.mean()  # The wrong mean would show.
    shown(f"{seen[-1]:.3f}; the mean of batch means would be {of_batches:.3f}")


@ways
def test_c4_a_metric_with_a_threshold_in_training_is_that_of_numpy_also_when_loaded(way, tmp_path, shown):
    def update(kernel, x, y):
        off = x @ kernel - y
        return kernel - RATE * x.T @ (2 * off / len(x)), huber_in_numpy(off, 0.5)[:, 0]

    used = way([linear()], X, keras.optimizers.SGD(RATE), metrics=[HuberMetric(0.5)])
    before, after = used.train((X, Y)), used.reloaded(tmp_path).train((X, Y))
    expected, _ = by_numpy.train(update, (X, Y), ZEROS, epochs=4, batch_size=BATCH)
    close(before["huber"] + after["huber"], expected.mean(axis=1), rtol=1e-4)
    shown(f"{after['huber'][-1]:.3f} after loading, as in NumPy, {IN_EACH_WAY}")


# ------------------------------------------------------- C7, a loss added by a layer


def assert_falls_as_in_numpy(history, data, epochs, batch_size):
    """Compares the losses and the errors of the reconstruction with those of NumPy, from `curves.C7_START`."""

    def update(weights, x, y):
        w1, b1, w2, b2, w3, b3 = weights
        hidden = np.tanh(x @ w1 + b1)
        off, lost = hidden @ w2 + b2 - y, hidden @ w3 + b3 - x
        slopes = 2 * off / off.size, 0.05 * 2 * lost / lost.size
        of_hidden = (slopes[0] @ w2.T + slopes[1] @ w3.T) * (1 - hidden**2)
        parts = [(x, of_hidden), (hidden, slopes[0]), (hidden, slopes[1])]
        gradients = [part for inputs, slope in parts for part in (inputs.T @ slope, slope.sum(axis=0))]
        error = (lost**2).mean(axis=1)
        return by_numpy.descended(weights, gradients, RATE), np.stack([off[:, 0] ** 2 + 0.05 * error, error], axis=1)

    expected, _ = by_numpy.train(update, data, curves.C7_START, epochs, batch_size)
    found = np.array([history["loss"], history["reconstruction_error"]])
    assert (np.diff(found) < 0).all()
    close(found, expected.mean(axis=1).T, rtol=1e-4)


@registered
class Reconstructing(keras.Layer):
    """A hidden layer from which its inputs are to be reconstructed."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.hidden = layers.Dense(units, "tanh")
        self.error = keras.metrics.Mean(name="reconstruction_error")

    def build(self, shape):
        self.hidden.build(shape)
        self.reconstruct = built(layers.Dense(shape[-1]), self.units)

    def call(self, x, training=False):
        hidden = self.hidden(x)
        errors = ops.mean((self.reconstruct(hidden) - x) ** 2, axis=-1)
        self.add_loss(0.05 * ops.mean(errors))
        if training:
            self.error.update_state(errors)
        return hidden

    def get_config(self):
        return super().get_config() | {"units": self.units}


@ways
def test_c7_add_loss_of_a_layer_and_its_metric_fall_as_in_numpy_also_when_loaded(way, tmp_path, shown):
    w1, b1, w2, b2, w3, b3 = curves.C7_START
    used = way([Reconstructing(8), layers.Dense(1)], X, keras.optimizers.SGD(RATE))
    used.net.set_weights([w1, b1, w3, b3, w2, b2])
    before, after = used.train((X, Y)), used.reloaded(tmp_path).train((X, Y))
    history = {name: values + after[name] for name, values in before.items()}
    assert_falls_as_in_numpy(history, (X, Y), epochs=4, batch_size=BATCH)
    loss, error = (history[name] for name in ("loss", "reconstruction_error"))
    shown(f"loss from {loss[0]:.3f} to {loss[-1]:.3f}, error from {error[0]:.3f} to {error[-1]:.3f}, {IN_EACH_WAY}")


@pytest.mark.once  # Starts three processes.
def test_c7_add_loss_and_a_metric_have_the_same_curves_on_three_backends():
    curves.assert_same_on_three_backends("c7/loss")
    curves.assert_same_on_three_backends("c7/reconstruction_error")


# ------------------------------------------------------------------ C8, custom optimizer


@registered
class Momentum(keras.Optimizer):
    """v <- momentum * v - rate * gradient; w <- w + v (Polyak, 1964)."""

    def __init__(self, learning_rate=0.01, momentum=0.9, name="momentum", **options):
        super().__init__(learning_rate=learning_rate, name=name, **options)
        self.momentum = momentum

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        velocity = self.velocities[self._get_variable_index(variable)]
        rate = ops.cast(learning_rate, variable.dtype)
        self.assign(velocity, self.momentum * velocity - rate * ops.cast(gradient, variable.dtype))
        self.assign_add(variable, velocity)

    def get_config(self):
        return super().get_config() | {"momentum": self.momentum}


@ways
def test_c8_a_custom_optimizer_follows_the_recurrence_of_numpy(way, shown):
    velocity = ZEROS

    def update(weights, x, y):
        nonlocal velocity
        off = x @ weights[0] - y
        velocity = 0.8 * velocity - 0.05 * 2 * x.T @ off / len(x)
        return [weights[0] + velocity], off[:, 0] ** 2

    optimizer = Momentum(0.05, momentum=0.8)
    assert_trains_as_in_numpy(way([linear()], X, optimizer), (X, Y), update, [ZEROS], epochs=3)
    close(optimizer.velocities[0], velocity, rtol=1e-3, atol=1e-5)
    assert int(optimizer.iterations) == 3 * 7
    difference = np.abs(numpy(optimizer.velocities[0]) - velocity).max()
    shown(f"velocities differ from NumPy by {below(difference)}, {IN_EACH_WAY}")


@ways
def test_c8_a_custom_optimizer_trains_on_exactly_when_saved_and_loaded(way, tmp_path):
    used = way([layers.Dense(1)], X, Momentum(0.05, momentum=0.8))
    loaded = assert_trains_on_exactly(used, (X, Y), tmp_path)
    assert type(loaded.optimizer) is Momentum
    assert loaded.optimizer.momentum == 0.8
    assert np.any(numpy(loaded.optimizer.velocities[0]))


@pytest.mark.parametrize("build", [functional, subclassed])
def test_c8_fit_by_a_custom_optimizer_resumes_exactly(build, tmp_path, shown):
    def run(run_dir, stop=0):
        model = build([layers.Dense(1, kernel_initializer="zeros")], X, Momentum(0.05, momentum=0.8)).net
        callbacks = [StopAt(stop)]
        options = {"batch_size": 64, "epochs": 2, "shuffle": False, "callbacks": callbacks, "verbose": 0}
        history = model.fit(X, Y, run_dir=run_dir, save=hl.every(steps=3), **options)
        return left(run_dir, {"model": model}, history, callbacks)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=11)
    assert run(tmp_path / "run") == whole
    assert any("velocities" in name for name in whole["saved"])
    shown("bitwise identical when resumed")
