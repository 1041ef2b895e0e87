"""Rows C: own losses, activations, metrics, optimizers and the like; `test_c_layers.py` has the layers."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._keras import layers_of
from tests.resume.runs import left
from tests.resume.stopped import StopAt, Stopped
from tests.rows import curves
from tests.rows.components import (
    IN_EACH_WAY,
    WAYS,
    ChainModel,
    InModel,
    functional,
    goes_on_as_if_it_had_never_been_saved,
    in_numpy,
    metric_ways,
    registered,
    subclassed,
    ways,
)
from tests.rows.figures import below
from tests.rows.real_data import diabetes

RATE = 0.1
X, Y = diabetes()
in_models = pytest.mark.parametrize("build", [functional, subclassed])


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


def huber_by_hand(error, threshold):
    error = np.abs(error)
    return np.where(error <= threshold, error**2 / 2, threshold * (error - threshold / 2))


HUBERS = {"function": (huber, 1.0), "factory": (create_huber(0.5), 0.5), "class": (HuberLoss(2.0), 2.0)}
OFF = np.array([[0.25], [1.5], [-3.0], [-0.5]], "float32")
WEIGHT = np.array([1.0, 0.0, 2.0, 0.5], "float32")


@pytest.mark.parametrize("form", HUBERS)
def test_c1_huber_of_each_example_is_that_of_numpy(form, eagerly):
    loss, threshold = HUBERS[form]
    loss = HuberLoss(threshold, reduction=None) if form == "class" else loss
    found = hl.function(loss)(np.zeros_like(OFF), OFF)
    np.testing.assert_allclose(ops.convert_to_numpy(found), huber_by_hand(OFF, threshold)[:, 0], rtol=1e-6)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
def test_c1_every_reduction_of_huber(weight, eagerly, shown):
    of_example = huber_by_hand(OFF, 2.0)[:, 0] * (1 if weight is None else weight)
    expected = {
        None: of_example,
        "none": of_example,
        "sum": of_example.sum(),
        "mean": of_example.mean(),
        "sum_over_batch_size": of_example.mean(),
        "mean_with_sample_weight": of_example.sum() / (4 if weight is None else weight.sum()),
    }
    losses = {reduction: HuberLoss(2.0, reduction=reduction) for reduction in expected}

    @hl.function
    def reduced(y, y_pred):
        return [loss(y, y_pred, sample_weight=weight) for loss in losses.values()]

    for found, right in zip(reduced(np.zeros_like(OFF), OFF), expected.values(), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(found), right, rtol=1e-6)
    shown(f"{len(expected)} reductions as in NumPy")


@ways
@pytest.mark.parametrize("form", HUBERS)
def test_c1_huber_trains_as_in_numpy_and_heeds_sample_weights(form, way, shown):
    loss, threshold = HUBERS[form]
    data = (X, Y, np.random.default_rng(0).uniform(0, 2, 442).astype("float32"))

    def update(kernel, x, y, weight):
        off = x @ kernel - y
        slope = np.clip(off, -threshold, threshold) * weight[:, None] / len(x)
        return kernel - RATE * x.T @ slope, weight * huber_by_hand(off, threshold)[:, 0]

    layer = linear()
    history = way([layer], X, keras.optimizers.SGD(RATE), loss).train(data)
    losses, kernel = in_numpy(update, data, ZEROS)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(layer.get_weights()[0], kernel, rtol=1e-3, atol=1e-5)
    shown(f"weighted loss {history['loss'][-1]:.3f} as in NumPy, {IN_EACH_WAY}")


@in_models
def test_c1_the_threshold_of_a_huber_loss_survives_saving(build, tmp_path, shown):
    loaded = build([linear()], X, loss=HuberLoss(0.25)).reloaded(tmp_path).net
    assert loaded.loss.threshold == 0.25
    np.testing.assert_allclose(loaded.evaluate(X, Y, verbose=0), huber_by_hand(Y, 0.25).mean(), rtol=1e-5)
    shown(f"threshold {loaded.loss.threshold} after loading")


def test_c1_a_function_with_a_threshold_of_its_own_is_given_again_on_loading(tmp_path):
    functional([linear()], X, loss=create_huber(0.25)).net.save(tmp_path / "model.keras")
    own = {"huber_with_threshold": create_huber(0.25)}
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=own)
    np.testing.assert_allclose(loaded.evaluate(X, Y, verbose=0), huber_by_hand(Y, 0.25).mean(), rtol=1e-5)


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
    """Something with one number, which its config holds."""

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


def layer_of(parts):
    activation, initializer, regularizer, constraint = parts
    return layers.Dense(
        1,
        use_bias=False,
        activation=activation,
        kernel_initializer=initializer,
        kernel_regularizer=regularizer,
        kernel_constraint=constraint,
    )


@ways
@pytest.mark.parametrize("form", PARTS)
def test_c2_own_activation_initializer_regularizer_and_constraint_train_as_in_numpy(form, way, shown):
    parts, (leak, steep, penalty, least) = PARTS[form]

    def update(kernel, x, y):
        before = x @ kernel
        off = np.where(before > 0, before, leak * before) - y
        slope = 2 * off * np.where(before > 0, 1, leak) / len(x)
        moved = kernel - RATE * (x.T @ slope + 2 * penalty * kernel)
        return np.maximum(moved, least), off[:, 0] ** 2 + penalty * (kernel**2).sum()

    layer = layer_of(parts)
    history = way([layer], X, keras.optimizers.SGD(RATE)).train((X, Y))
    losses, kernel = in_numpy(update, (X, Y), np.linspace(-steep, steep, 10)[:, None])
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(layer.get_weights()[0], kernel, rtol=1e-3, atol=1e-5)
    assert (kernel == least).any()  # The constraint had something to do.
    shown(f"loss {history['loss'][-1]:.3f} as in NumPy, {IN_EACH_WAY}")


@ways
@pytest.mark.parametrize("form", PARTS)
def test_c2_their_configs_survive_saving(form, way, tmp_path, shown):
    parts, numbers = PARTS[form]
    loaded = goes_on_as_if_it_had_never_been_saved(way([layer_of(parts)], X), (X, Y), tmp_path)
    [layer] = [layer for layer in layers_of(loaded.net) if isinstance(layer, layers.Dense)]
    found = layer.activation, layer.kernel_initializer, layer.kernel_regularizer, layer.kernel_constraint
    if form == "classes":
        assert [type(part) for part in found] == [Leaky, Ramp, Squared, AtLeast]
        assert tuple(part.number for part in found) == numbers
    else:
        assert found == parts
    shown("trains on to the bit after loading")


# -------------------------------------------------------------- C3, streaming precision


@registered
class StreamingPrecision(keras.Metric):
    """Right positives among all positives, over what was seen since the reset."""

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
    ids=["own", "Keras's"],
)


def count(variable):
    return float(np.sum(ops.convert_to_numpy(variable)))


@precisions
def test_c3_precision_streams_and_is_reset(make, eagerly, shown):
    precision = make()

    @hl.function
    def step(truth, guess):
        precision.update_state(truth, guess)
        return precision.result()

    for _ in range(2):
        first, second = (float(step(*batch)) for batch in zip(TRUTH, GUESS, strict=True))
        assert first == pytest.approx(0.8)
        assert second == pytest.approx(0.5)
        assert [count(precision.true_positives), count(precision.false_positives)] == [4, 4]
        counts = f"TP {count(precision.true_positives):.0f}", f"FP {count(precision.false_positives):.0f}"
        precision.reset_state()
        assert [count(precision.true_positives), count(precision.false_positives)] == [0, 0]
    shown(f"{first:.1f} then {second:.1f}; {' and '.join(counts)}")


@metric_ways
@precisions
def test_c3_precision_streams_over_batches_and_begins_anew_each_epoch(make, measure, shown):
    seen = measure(make(), TRUTH.reshape(16, 1), GUESS.reshape(16, 1), batch_size=8, epochs=2)
    np.testing.assert_allclose(seen, [0.8, 0.5, 0.8, 0.5], rtol=1e-6)
    shown(f"the same {IN_EACH_WAY}")


def share_off(y, y_pred):
    """A metric that is a function: for each example, the share of outputs that are off by more than a half."""
    return ops.mean(ops.cast(ops.abs(y - y_pred) > 0.5, "float32"), axis=-1)


@metric_ways
def test_c3_a_metric_that_is_a_function_is_the_mean_over_examples(measure):
    seen = measure(share_off, TRUTH.reshape(16, 1), GUESS.reshape(16, 1), batch_size=5, epochs=1)
    assert seen[-1] == pytest.approx(np.mean(GUESS != TRUTH))


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


# Batches of 4 and of 1: the mean of the means of batches would be another.
ERRORS = np.array([[0.5], [1.0], [0.0], [-1.5], [8.0]], "float32")


@metric_ways
def test_c4_a_huber_metric_is_the_mean_over_examples_and_not_over_batches(measure, shown):
    seen = measure(HuberMetric(2.0), ERRORS, np.zeros_like(ERRORS), batch_size=4, epochs=2)
    of_examples = huber_by_hand(ERRORS, 2.0)
    np.testing.assert_allclose(seen, 2 * [of_examples[:4].mean(), of_examples.mean()], rtol=1e-6)
    of_batches = np.mean([of_examples[:4].mean(), of_examples[4:].mean()])
    assert of_batches > 2 * of_examples.mean()  # What would be wrong shows.
    shown(f"{seen[-1]:.3f}; the mean of the means of batches would be {of_batches:.3f}")


@ways
def test_c4_a_huber_metric_in_training_is_that_of_numpy_also_when_loaded(way, tmp_path, shown):
    def update(kernel, x, y):
        off = x @ kernel - y
        return kernel - RATE * x.T @ (2 * off / len(x)), huber_by_hand(off, 0.5)[:, 0]

    used = way([linear()], X, keras.optimizers.SGD(RATE), metrics=[HuberMetric(0.5)])
    before, after = used.train((X, Y)), used.reloaded(tmp_path).train((X, Y))
    expected, _ = in_numpy(update, (X, Y), ZEROS, epochs=4)
    np.testing.assert_allclose(before["huber"] + after["huber"], expected, rtol=1e-4)
    shown(f"{after['huber'][-1]:.3f} after loading, as in NumPy, {IN_EACH_WAY}")


# ------------------------------------------------------- C7, a loss added by a layer


def update_of_reconstructing_regressor(weights, x, y):
    """One update in NumPy: the weights, and of each example the loss and the error of the reconstruction."""
    w1, b1, w2, b2, w3, b3 = weights
    hidden = np.tanh(x @ w1 + b1)
    off, lost = hidden @ w2 + b2 - y, hidden @ w3 + b3 - x
    d_off, d_lost = 2 * off / off.size, 0.05 * 2 * lost / lost.size
    d_hidden = (d_off @ w2.T + d_lost @ w3.T) * (1 - hidden**2)
    inputs_and_slopes = [(x, d_hidden), (hidden, d_off), (hidden, d_lost)]
    gradients = [part for inputs, slope in inputs_and_slopes for part in (inputs.T @ slope, slope.sum(axis=0))]
    error = (lost**2).mean(axis=1)
    reported = np.stack([off[:, 0] ** 2 + 0.05 * error, error], axis=1)
    return [weight - RATE * gradient for weight, gradient in zip(weights, gradients, strict=True)], reported


def assert_fall_as_in_numpy(history, data, weights, epochs, **options):
    expected, _ = in_numpy(update_of_reconstructing_regressor, data, weights, epochs, **options)
    assert history.keys() == {"loss", "reconstruction_error"}
    for name, curve in zip(("loss", "reconstruction_error"), expected.T, strict=True):
        assert (np.diff(history[name]) < 0).all()
        np.testing.assert_allclose(history[name], curve, rtol=1e-4)


@pytest.mark.parametrize("kind", [curves.ReconstructingRegressor, curves.WithAnOwnStep])
def test_c7_a_reconstruction_loss_by_add_loss_and_its_error_as_a_metric_fall_as_in_numpy(kind):
    assert_fall_as_in_numpy(curves.c7(kind), (X[:440], Y[:440]), curves.C7_START, epochs=8, batch_size=88)


@registered
class Reconstructing(keras.Layer):
    """A hidden layer from which its inputs are to be rebuilt."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.hidden = layers.Dense(units, "tanh")
        self.error = keras.metrics.Mean(name="reconstruction_error")

    def build(self, shape):
        self.reconstruct = layers.Dense(shape[-1])
        self.hidden.build(shape)
        self.reconstruct.build((None, self.units))

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
def test_c7_a_layer_that_adds_a_loss_and_has_a_metric_trains_as_in_numpy_also_when_loaded(way, tmp_path, shown):
    w1, b1, w2, b2, w3, b3 = curves.C7_START
    used = way([Reconstructing(8), layers.Dense(1)], X, keras.optimizers.SGD(RATE))
    used.net.set_weights([w1, b1, w3, b3, w2, b2])
    before, after = used.train((X, Y)), used.reloaded(tmp_path).train((X, Y))
    history = {name: values + after[name] for name, values in before.items()}
    assert_fall_as_in_numpy(history, (X, Y), curves.C7_START, epochs=4)
    first, last = ((history["loss"][at], history["reconstruction_error"][at]) for at in (0, -1))
    shown(f"loss from {first[0]:.3f} to {last[0]:.3f}, error from {first[1]:.3f} to {last[1]:.3f}, {IN_EACH_WAY}")


@pytest.mark.once  # Starts three processes.
def test_c7_a_reconstruction_loss_is_identical_on_three_backends():
    found = curves.on_three_backends()
    for name in ("c7/loss", "c7/reconstruction_error"):
        for backend in found:
            np.testing.assert_allclose(found[backend][name], found["jax"][name], rtol=1e-4, err_msg=backend)


# ------------------------------------------------------------------ C8, own optimizer


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
def test_c8_an_own_optimizer_follows_the_recurrence_of_numpy(way, shown):
    def update(state, x, y):
        kernel, velocity = state
        off = x @ kernel - y
        velocity = 0.8 * velocity - 0.05 * 2 * x.T @ off / len(x)
        return (kernel + velocity, velocity), off[:, 0] ** 2

    layer, optimizer = linear(), Momentum(0.05, momentum=0.8)
    history = way([layer], X, optimizer).train((X, Y), epochs=3)
    losses, (kernel, velocity) = in_numpy(update, (X, Y), (ZEROS, ZEROS), epochs=3)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(layer.get_weights()[0], kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(optimizer.velocities[0]), velocity, rtol=1e-3, atol=1e-5)
    assert int(optimizer.iterations) == 3 * 7
    off = np.abs(ops.convert_to_numpy(optimizer.velocities[0]) - velocity).max()
    shown(f"velocities off NumPy by {below(off)}, {IN_EACH_WAY}")


def test_c8_the_config_of_an_own_optimizer_makes_the_same_one():
    again = Momentum.from_config(Momentum(0.05, momentum=0.8).get_config())
    assert [again.momentum, float(again.learning_rate)] == [0.8, pytest.approx(0.05)]


@registered
class WithOwnStep(ChainModel):
    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))}


def with_own_step(parts, x, optimizer):
    model = WithOwnStep(parts)
    model(x[:1])
    return InModel(model, optimizer, loss=None)


@pytest.mark.parametrize("way", [*WAYS.values(), with_own_step], ids=[*WAYS, "own step"])
def test_c8_what_is_saved_with_an_own_optimizer_goes_on_exactly(way, tmp_path):
    used = way([layers.Dense(1)], X, Momentum(0.05, momentum=0.8))
    loaded = goes_on_as_if_it_had_never_been_saved(used, (X, Y), tmp_path)
    assert type(loaded.optimizer) is Momentum
    assert loaded.optimizer.momentum == 0.8
    assert np.any(ops.convert_to_numpy(loaded.optimizer.velocities[0]))


@pytest.mark.parametrize("build", [functional, subclassed, with_own_step])
def test_c8_a_run_by_an_own_optimizer_that_is_stopped_resumes_exactly(build, tmp_path, shown):
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
    shown("resumed to the bit")
