"""Rows C: own components."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.resume.runs import left
from tests.resume.stopped import StopAt, Stopped
from tests.rows import curves
from tests.rows.real_data import diabetes

registered = keras.saving.register_keras_serializable("rows")
RATE = 0.1


# ------------------------------------------------------------ the ways to use them


def functional(layer):
    inputs = keras.Input((10,))
    return hl.Model(inputs, layer(inputs))


@registered
class Subclassed(hl.Model):
    """A model of one layer, with a `call` of its own."""

    def __init__(self, layer, **options):
        super().__init__(**options)
        self.layer = layer

    def call(self, x):
        return self.layer(x)

    def get_config(self):
        return {"layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["layer"]))


def subclassed(layer):
    model = Subclassed(layer)
    model(np.zeros((1, 10), "float32"))
    return model


def by_default(build):
    """Trains a layer in a model, by the model's own `fit`; returns what is reported."""

    def train(layer, loss, data, optimizer, **options):
        x, y, *weight = data
        model = build(layer)
        model.compile(optimizer, loss)
        options = {"batch_size": 64, "shuffle": False, "verbose": 0} | options
        return model.fit(x, y, sample_weight=weight[0] if weight else None, **options).history

    return train


def by_own_step(layer, loss, data, optimizer, batch_size=64, **options):
    """Trains a layer by itself, in a step that is a plain function; returns what is reported."""

    def step(x, y, weight=None):
        def loss_fn():
            if isinstance(loss, keras.Loss):
                return loss(y, layer(x), sample_weight=weight)
            values = loss(y, layer(x))
            return ops.mean(values if weight is None else values * weight)

        return {"loss": hl.minimize(loss_fn, layer, optimizer)}

    layer.build((None, 10))
    return hl.fit(step, hl.Feed(data, batch_size=batch_size), verbose=0, **options).history


ways = pytest.mark.parametrize(
    "train",
    [by_default(functional), by_default(subclassed), by_own_step],
    ids=["functional", "subclassed", "own step"],
)


def by_hand(update, data, kernel, epochs=2, batch_size=64):
    """Trains a kernel in NumPy.

    Args:
        update: Takes the kernel and a batch; returns the next kernel, and the loss of each example.
        data: Arrays.
        kernel: To begin with.
        epochs: How often.
        batch_size: The last batch is what is left.

    Returns:
        The mean loss of each epoch, and the last kernel.
    """
    losses = np.empty((epochs, len(data[0])))
    for epoch in range(epochs):
        for first in range(0, len(data[0]), batch_size):
            batch = slice(first, first + batch_size)
            kernel, losses[epoch, batch] = update(kernel, *(array[batch].astype("float64") for array in data))
    return losses.mean(axis=1), kernel


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
def test_c1_every_reduction_of_huber(weight, eagerly):
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


@ways
@pytest.mark.parametrize("form", HUBERS)
def test_c1_huber_trains_as_in_numpy_and_heeds_sample_weights(form, train):
    loss, threshold = HUBERS[form]
    data = (*diabetes(), np.random.default_rng(0).uniform(0, 2, 442).astype("float32"))

    def update(kernel, x, y, weight):
        off = x @ kernel - y
        slope = np.clip(off, -threshold, threshold) * weight[:, None] / len(x)
        return kernel - RATE * x.T @ slope, weight * huber_by_hand(off, threshold)[:, 0]

    layer = linear()
    history = train(layer, loss, data, keras.optimizers.SGD(RATE), epochs=2)
    losses, kernel = by_hand(update, data, ZEROS)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(layer.get_weights()[0], kernel, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("build", [functional, subclassed])
def test_c1_the_threshold_of_a_huber_loss_survives_saving(build, tmp_path):
    model = build(linear())
    model.compile(keras.optimizers.SGD(RATE), HuberLoss(0.25))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.loss.threshold == 0.25
    x, y = diabetes()
    np.testing.assert_allclose(loaded.evaluate(x, y, verbose=0), huber_by_hand(y, 0.25).mean(), rtol=1e-5)


def test_c1_a_function_with_a_threshold_of_its_own_is_given_again_on_loading(tmp_path):
    model = functional(linear())
    model.compile(keras.optimizers.SGD(RATE), create_huber(0.25))
    model.save(tmp_path / "model.keras")
    own = {"huber_with_threshold": create_huber(0.25)}
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=own)
    x, y = diabetes()
    np.testing.assert_allclose(loaded.evaluate(x, y, verbose=0), huber_by_hand(y, 0.25).mean(), rtol=1e-5)


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
def test_c2_own_activation_initializer_regularizer_and_constraint_train_as_in_numpy(form, train):
    parts, (leak, steep, penalty, least) = PARTS[form]

    def update(kernel, x, y):
        before = x @ kernel
        off = np.where(before > 0, before, leak * before) - y
        slope = 2 * off * np.where(before > 0, 1, leak) / len(x)
        moved = kernel - RATE * (x.T @ slope + 2 * penalty * kernel)
        return np.maximum(moved, least), off[:, 0] ** 2 + penalty * (kernel**2).sum()

    layer, data = layer_of(parts), diabetes()
    history = train(layer, keras.losses.MeanSquaredError(), data, keras.optimizers.SGD(RATE), epochs=2)
    losses, kernel = by_hand(update, data, np.linspace(-steep, steep, 10)[:, None])
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(layer.get_weights()[0], kernel, rtol=1e-3, atol=1e-5)
    assert (kernel == least).any()  # The constraint had something to do.


def trains_on_as_one_that_was_never_saved(model, path):
    """Saves and loads a model in the midst of training; returns the loaded one, the same to the bit ever after."""
    data, options = diabetes(), {"batch_size": 64, "shuffle": False, "verbose": 0}
    model.fit(*data, epochs=2, **options)
    model.save(path)
    loaded = keras.saving.load_model(path)
    histories = [either.fit(*data, epochs=2, **options).history for either in (model, loaded)]
    assert histories[0] == histories[1]
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))
    return loaded


@pytest.mark.parametrize("build", [functional, subclassed])
@pytest.mark.parametrize("form", PARTS)
def test_c2_their_configs_survive_saving(form, build, tmp_path):
    parts, numbers = PARTS[form]
    model = build(layer_of(parts))
    model.compile(keras.optimizers.SGD(RATE), "mse")
    loaded = trains_on_as_one_that_was_never_saved(model, tmp_path / "model.keras")
    layer = loaded.layers[-1]
    found = layer.activation, layer.kernel_initializer, layer.kernel_regularizer, layer.kernel_constraint
    if form == "classes":
        assert [type(part) for part in found] == [Leaky, Ramp, Squared, AtLeast]
        assert tuple(part.number for part in found) == numbers
    else:
        assert found == parts


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
def test_c3_precision_streams_and_is_reset(make, eagerly):
    precision = make()

    @hl.function
    def step(truth, guess):
        precision.update_state(truth, guess)
        return precision.result()

    for _ in range(2):
        assert float(step(TRUTH[0], GUESS[0])) == pytest.approx(0.8)
        assert float(step(TRUTH[1], GUESS[1])) == pytest.approx(0.5)
        assert [count(precision.true_positives), count(precision.false_positives)] == [4, 4]
        precision.reset_state()
        assert [count(precision.true_positives), count(precision.false_positives)] == [0, 0]


def as_it_is():
    inputs = keras.Input((1,))
    return hl.Model(inputs, layers.Identity()(inputs))


class AsItIs(hl.Model):
    def call(self, x):
        return ops.copy(x)


class Seen(keras.callbacks.Callback):
    """One reported value, after each batch."""

    def __init__(self, name):
        super().__init__()
        self.name, self.values = name, []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(logs[self.name])

    on_test_batch_end = on_train_batch_end


@precisions
@pytest.mark.parametrize("build", [as_it_is, AsItIs], ids=["functional", "subclassed"])
def test_c3_precision_streams_over_the_batches_of_a_model(build, make):
    model, seen = build(), Seen("streaming_precision")
    model.compile(metrics=[make()], loss="mse")
    for _ in range(2):
        model.evaluate(GUESS.reshape(16, 1), TRUTH.reshape(16, 1), batch_size=8, callbacks=[seen], verbose=0)
    np.testing.assert_allclose(seen.values, [0.8, 0.5, 0.8, 0.5], rtol=1e-6)


@precisions
def test_c3_precision_streams_in_an_own_step(make, eagerly):
    precision, seen = make(), Seen("streaming_precision")

    def step(truth, guess):
        precision.update_state(truth, guess)
        return {precision.name: precision.result()}

    feed = hl.Feed((TRUTH.ravel(), GUESS.ravel()), batch_size=8)
    history = hl.fit(step, feed, epochs=2, callbacks=[seen], verbose=0).history
    np.testing.assert_allclose(seen.values, [0.8, 0.5, 0.8, 0.5], rtol=1e-6)
    np.testing.assert_allclose(history["streaming_precision"], [0.5, 0.5], rtol=1e-6)
    assert [count(precision.true_positives), count(precision.false_positives)] == [4, 4]


def share_off(y, y_pred):
    """A metric that is a function: for each example, the share of outputs that are off by more than a half."""
    return ops.mean(ops.cast(ops.abs(y - y_pred) > 0.5, "float32"), axis=-1)


@pytest.mark.parametrize("build", [as_it_is, AsItIs], ids=["functional", "subclassed"])
def test_c3_a_function_is_a_metric_of_a_model(build):
    model = build()
    model.compile(metrics=[share_off], loss="mse")
    found = model.evaluate(GUESS.reshape(16, 1), TRUTH.reshape(16, 1), batch_size=5, verbose=0, return_dict=True)
    assert found["share_off"] == pytest.approx(np.mean(GUESS != TRUTH))


def test_c3_a_function_is_a_metric_of_an_own_step(eagerly):
    def step(truth, guess):
        return {"share_off": ops.mean(share_off(truth, guess))}

    feed = hl.Feed((TRUTH.reshape(16, 1), GUESS.reshape(16, 1)), batch_size=5)
    [found] = hl.fit(step, feed, verbose=0).history["share_off"]
    assert found == pytest.approx(np.mean(GUESS != TRUTH))


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
MEAN_HUBER = huber_by_hand(ERRORS, 2.0).mean()


@pytest.mark.parametrize("build", [as_it_is, AsItIs], ids=["functional", "subclassed"])
def test_c4_a_huber_metric_is_the_mean_over_examples_in_a_model(build):
    model = build()
    model.compile(metrics=[HuberMetric(2.0)], loss="mse")
    for _ in range(2):
        found = model.evaluate(ERRORS, np.zeros_like(ERRORS), batch_size=4, verbose=0, return_dict=True)
        assert found["huber"] == pytest.approx(MEAN_HUBER, rel=1e-6)
    of_batches = [huber_by_hand(batch, 2.0).mean() for batch in (ERRORS[:4], ERRORS[4:])]
    assert np.mean(of_batches) > 2 * MEAN_HUBER  # What would be wrong shows.


def test_c4_a_huber_metric_is_the_mean_over_examples_in_an_own_step(eagerly):
    metric = HuberMetric(2.0)

    def step(y, y_pred):
        metric.update_state(y, y_pred)
        return {"huber": metric}

    history = hl.fit(step, hl.Feed((np.zeros_like(ERRORS), ERRORS), batch_size=4), epochs=2, verbose=0).history
    np.testing.assert_allclose(history["huber"], 2 * [MEAN_HUBER], rtol=1e-6)


@pytest.mark.parametrize("build", [functional, subclassed])
def test_c4_the_threshold_of_a_huber_metric_survives_saving(build, tmp_path):
    model, (x, y) = build(linear()), diabetes()
    model.compile(keras.optimizers.SGD(RATE), "mse", metrics=[HuberMetric(0.25)])
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    off = y - x @ loaded.get_weights()[0]
    found = loaded.evaluate(x, y, verbose=0, return_dict=True)
    assert found["huber"] == pytest.approx(huber_by_hand(off, 0.25).mean(), rel=1e-4)


# ------------------------------------------------------- C7, a loss added by a layer


def reconstructing_regressor_by_hand():
    """The run `curves.c7` in NumPy: loss and error of the reconstruction by epoch."""
    x, y = (array[:440].astype("float64") for array in diabetes())
    weights = [weight.astype("float64") for weight in curves.start((10, 8), 8, (8, 1), 1, (8, 10), 10)]
    losses, errors = [], []
    for _ in range(8):
        for x_batch, y_batch in zip(np.split(x, 5), np.split(y, 5), strict=True):
            w1, b1, w2, b2, w3, b3 = weights
            hidden = np.tanh(x_batch @ w1 + b1)
            off, lost = hidden @ w2 + b2 - y_batch, hidden @ w3 + b3 - x_batch
            errors.append((lost**2).mean())
            losses.append((off**2).mean() + 0.05 * errors[-1])
            d_off, d_lost = 2 * off / off.size, 0.05 * 2 * lost / lost.size
            d_hidden = (d_off @ w2.T + d_lost @ w3.T) * (1 - hidden**2)
            inputs_and_slopes = [(x_batch, d_hidden), (hidden, d_off), (hidden, d_lost)]
            gradients = [part for inputs, slope in inputs_and_slopes for part in (inputs.T @ slope, slope.sum(axis=0))]
            weights = [weight - 0.1 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    by_epoch = [np.reshape(values, (8, 5)).mean(axis=1) for values in (losses, errors)]
    return dict(zip(("loss", "reconstruction_error"), by_epoch, strict=True))


@pytest.mark.parametrize("kind", [curves.ReconstructingRegressor, curves.WithAnOwnStep])
def test_c7_a_reconstruction_loss_by_add_loss_and_its_error_as_a_metric_fall_as_in_numpy(kind):
    found, expected = curves.c7(kind), reconstructing_regressor_by_hand()
    assert found.keys() == expected.keys()
    for name, curve in found.items():
        assert (np.diff(curve) < 0).all()
        np.testing.assert_allclose(curve, expected[name], rtol=1e-4)


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
def test_c8_an_own_optimizer_follows_the_recurrence_of_numpy(train):
    def update(state, x, y):
        kernel, velocity = state
        off = x @ kernel - y
        velocity = 0.8 * velocity - 0.05 * 2 * x.T @ off / len(x)
        return (kernel + velocity, velocity), off[:, 0] ** 2

    layer, optimizer = linear(), Momentum(0.05, momentum=0.8)
    history = train(layer, keras.losses.MeanSquaredError(), diabetes(), optimizer, epochs=3)
    losses, (kernel, velocity) = by_hand(update, diabetes(), (ZEROS, ZEROS), epochs=3)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(layer.get_weights()[0], kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(optimizer.velocities[0]), velocity, rtol=1e-3, atol=1e-5)
    assert int(optimizer.iterations) == 3 * 7


def test_c8_the_config_of_an_own_optimizer_makes_the_same_one():
    again = Momentum.from_config(Momentum(0.05, momentum=0.8).get_config())
    assert [again.momentum, float(again.learning_rate)] == [0.8, pytest.approx(0.05)]


@registered
class WithOwnStep(Subclassed):
    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x, training=True) - y) ** 2))}


def with_own_step(layer):
    model = WithOwnStep(layer)
    model(np.zeros((1, 10), "float32"))
    return model


@pytest.mark.parametrize("build", [functional, subclassed, with_own_step])
def test_c8_a_saved_model_and_its_own_optimizer_resume_exactly(build, tmp_path):
    model = build(layers.Dense(1))
    model.compile(Momentum(0.05, momentum=0.8), "mse")
    loaded = trains_on_as_one_that_was_never_saved(model, tmp_path / "model.keras")
    assert type(loaded.optimizer) is Momentum
    assert loaded.optimizer.momentum == 0.8
    assert np.any(ops.convert_to_numpy(loaded.optimizer.velocities[0]))


@pytest.mark.parametrize("build", [functional, subclassed, with_own_step])
def test_c8_a_run_by_an_own_optimizer_that_is_stopped_resumes_exactly(build, tmp_path):
    def run(run_dir, stop=0):
        model, callbacks = build(layers.Dense(1, kernel_initializer="zeros")), [StopAt(stop)]
        model.compile(Momentum.from_config(Momentum(0.05, momentum=0.8).get_config()), "mse")
        options = {"batch_size": 64, "epochs": 2, "shuffle": False, "callbacks": callbacks, "verbose": 0}
        history = model.fit(*diabetes(), run_dir=run_dir, save=hl.every(steps=3), **options)
        return left(run_dir, {"model": model}, history, callbacks)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=11)
    assert run(tmp_path / "run") == whole
    assert any("velocities" in name for name in whole["saved"])
