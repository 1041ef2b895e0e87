"""Sample weights: bad weights are errors; a warning names weights, masks and penalties that a step does not use."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import DataError, HandloomWarning
from tests.models import compiled, fit, functional
from tests.numbers import close, each_close, each_same, ones

X = np.arange(24, dtype="float32").reshape(12, 2)
Y = X.sum(axis=1, keepdims=True)
WEIGHTS = ones(12)
HALF = np.repeat(np.float32([1, 0]), 6)


def regressor(cls=hl.Model):
    return compiled(functional(inputs=2, cls=cls), "sgd")


def two_outputs(cls=hl.Model):
    inputs = keras.Input((2,))
    return compiled(cls(inputs, {"a": layers.Dense(1)(inputs), "b": layers.Dense(1)(inputs)}), "sgd")


def with_weight(value, place=5):
    weights = WEIGHTS.copy()
    weights[place] = value
    return weights


def batches_of(*batches):
    return lambda: iter(batches)


def refused(words):
    return pytest.raises(DataError, match=words)


# ------------------------------------------------------------------------ bad weights


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_model_refuses_a_weight_that_is_negative_or_not_finite(method, value):
    quiet = {"verbose": 0} if method in ("fit", "evaluate") else {}
    model = regressor()
    before = model.get_weights()
    with refused(rf"sample_weight has 1 value.*the first is {value} at \[5\].*advantages.*HL410"):
        getattr(model, method)(X, Y, sample_weight=with_weight(value), **quiet)
    each_same(model.get_weights(), before)


@pytest.mark.parametrize("source", [lambda data: data, batches_of], ids=["arrays", "batches"])
def test_fit_and_evaluate_check_the_weights_in_a_feed(source):
    negative, zero = (hl.Feed(source((X, Y, weights))) for weights in (with_weight(-2), 0 * WEIGHTS))
    model = regressor()
    for method in (model.fit, model.evaluate):
        with refused(r"negative or not finite; the first is -2\.0 at \[5\]"):
            method(negative, verbose=0)
    with refused("sums to zero"):
        fit(model, zero)
    assert model.evaluate(zero, verbose=0) == 0  # As with arrays.


def test_fit_refuses_a_negative_weight_of_validation_data_before_training():
    model = regressor()
    with refused("negative"):
        fit(model, X, Y, validation_data=(X, Y, with_weight(-1)))
    assert model.optimizer.iterations == 0


def test_fit_of_a_plain_step_refuses_a_negative_weight():
    def step(x, sample_weight):
        return {"mean": ops.sum(x[:, 0] * sample_weight)}

    data = X, with_weight(-2)
    feed = hl.Feed(data)
    for options in ({"data": data}, {"data": feed}, {"data": (X, WEIGHTS), "validate": (step, data)}):
        with refused(r"the first is -2.0 at \[5\]"):
            hl.fit(step, verbose=0, **options)
    assert len(list(feed)) == 1  # The feed itself has no check.


@pytest.mark.parametrize("class_weight", [{0: -1.0}, {0: np.nan}, {0: np.inf}])
def test_fit_refuses_a_bad_class_weight(class_weight):
    with refused(r"class_weight takes finite numbers, 0 or more; received \{0: .*HL401"):
        fit(regressor(), X, np.zeros((12, 1)), class_weight=class_weight)


def test_fit_refuses_weights_that_sum_to_zero_in_a_batch():
    words = re.escape("The sample_weight of a batch of 3 examples sums to zero") + ".*keep = sample_weight > 0.*HL411"
    model = regressor()
    with refused(words):
        fit(model, X, Y, sample_weight=HALF, batch_size=3)
    with refused(words):
        fit(model, batches_of((X[:3], Y[:3], HALF[6:9])))
    with refused("of 12 examples sums to zero"):
        model.train_on_batch(X, Y, sample_weight=0 * HALF)
    with refused(words):
        hl.fit(lambda x, sample_weight: {"x": ops.sum(sample_weight)}, batches_of((X[:3], HALF[6:9])), verbose=0)
    keep = HALF > 0  # The fix in the message.
    for data in ((X, Y, HALF), (X[keep], Y[keep], HALF[keep])):
        assert np.isfinite(fit(model, *data[:2], sample_weight=data[2], batch_size=len(data[0]))["loss"]).all()


def test_evaluate_accepts_weights_that_sum_to_zero_in_a_batch():
    # Keras divides by the number of examples, so the loss is defined.
    model = regressor()
    model.set_weights([np.zeros((2, 1)), np.zeros(1)])
    loss = model.evaluate(X, Y, sample_weight=HALF, batch_size=3, verbose=0)
    close(loss, (HALF * Y[:, 0] ** 2).mean(), rtol=1e-6)


def test_fit_accepts_weights_that_are_zero_for_one_of_several_outputs():
    model, y = two_outputs(), {"a": Y, "b": Y}
    fit(model, X, y, sample_weight={"a": WEIGHTS, "b": 0 * WEIGHTS})
    with refused("sums to zero"):
        fit(model, X, y, sample_weight={"a": 0 * WEIGHTS, "b": 0 * WEIGHTS})
    with refused("negative"):
        fit(model, X, y, sample_weight={"a": WEIGHTS, "b": with_weight(-1)})


# ------------------------------------------------------------ weights that a step does not use


def error(model, x, y, weight=1.0):
    return ops.mean(weight * (model(x) - y) ** 2)


class Forgetful(hl.Model):
    """Ignores the weights in the batch."""

    def train_step(self, data):
        return {"error": self.minimize(lambda: error(self, *data[:2]))}

    def test_step(self, data):
        return {"error": error(self, *data[:2])}


class Weighing(hl.Model):
    def train_step(self, data):
        x, y, weight = data
        return {"error": self.minimize(lambda: error(self, x, y, weight[:, None]))}


class WeighingAMetric(Forgetful):
    def train_step(self, data):
        self.seen.update_state(data[1], sample_weight=data[2])
        return super().train_step(data) | {"seen": self.seen}


class WeighingOneOutput(hl.Model):
    def train_step(self, data):
        x, y, weight = data

        def loss_fn():
            outputs = self(x)
            return ops.mean(weight["a"][:, None] * (outputs["a"] - y["a"]) ** 2) + ops.mean(outputs["b"])

        return {"error": self.minimize(loss_fn)}


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_fit_and_evaluate_warn_once_of_weights_that_a_step_does_not_use(method):
    step = {"fit": "train_step", "evaluate": "test_step"}[method]
    with pytest.warns(HandloomWarning, match=rf"{step} does not use the sample weights\. .*compute_loss") as warned:
        getattr(regressor(Forgetful), method)(X, Y, sample_weight=WEIGHTS, batch_size=5, verbose=0)
    assert len(warned) == 1


def test_fit_warns_of_class_weights_that_a_step_does_not_use():
    with pytest.warns(HandloomWarning, match="train_step does not use the sample weights"):
        fit(regressor(Forgetful), X, np.zeros((12, 1)), class_weight={0: 2.0})


def test_fit_of_a_plain_step_warns_of_weights_that_it_does_not_use():
    def step(x, sample_weight):
        return {"mean": ops.mean(x)}

    with pytest.warns(HandloomWarning, match="step does not use the sample weights"):
        hl.fit(step, (X, WEIGHTS), verbose=0)


@pytest.mark.parametrize("cls", [hl.Model, Weighing, WeighingAMetric])
def test_fit_does_not_warn_of_weights_that_a_step_uses(cls):
    model = regressor(cls)
    model.seen = keras.metrics.Mean(name="seen")
    fit(model, X, Y, sample_weight=WEIGHTS)


def test_fit_does_not_warn_if_one_of_the_weights_of_several_outputs_is_used():
    fit(two_outputs(WeighingOneOutput), X, {"a": Y, "b": Y}, sample_weight={"a": WEIGHTS, "b": WEIGHTS})


def test_fit_does_not_warn_without_weights_or_in_an_eager_step():
    fit(regressor(Forgetful), X, Y)
    with hl.run_eagerly(True):  # Only a trace shows what a step uses.
        fit(regressor(Forgetful), X, Y, sample_weight=WEIGHTS)


# ------------------------------------------------------------- masks, penalties


def masked(cls):
    inputs = keras.Input((3,), dtype="int32")
    embedded = layers.Embedding(5, 2, mask_zero=True)(inputs)
    return compiled(cls(inputs, layers.Dense(1, name="head")(embedded)), "sgd")


TOKENS, TARGETS = np.array([[1, 2, 0], [3, 0, 0], [4, 1, 2]], "int32"), ones(3, 3, 1)


class Masking(hl.Model):
    def train_step(self, data):
        x, y = data
        return {"error": self.minimize(lambda: keras.losses.MeanSquaredError()(y, self(x)))}


def test_fit_warns_once_of_a_mask_that_a_step_does_not_use_by_name():
    model = masked(Forgetful)
    words = f"train_step does not use the mask of the output of '{model.name}'\\. .*keras.losses.Loss"
    with pytest.warns(HandloomWarning, match=words) as warned:
        fit(model, TOKENS, TARGETS, epochs=2)
    assert len(warned) == 1


@pytest.mark.parametrize("cls", [hl.Model, Masking])
def test_fit_does_not_warn_of_a_mask_that_a_loss_uses(cls):
    fit(masked(cls), TOKENS, TARGETS)


class MaskingByHand(hl.Model):
    """Masks with what `compute_mask` of its embedding returns."""

    def real(self, x):
        return ops.cast(self.layers[1].compute_mask(x), "float32")[..., None]

    def train_step(self, data):
        x, y = data

        def loss():
            real = self.real(x)
            return ops.sum(real * (self(x) - y) ** 2) / ops.sum(real)

        return {"error": self.minimize(loss)}


class ForgettingItsMask(MaskingByHand):
    """Computes a mask by hand, and does not use it."""

    def train_step(self, data):
        self.real(data[0])
        return {"error": self.minimize(lambda: error(self, *data))}


def test_fit_does_not_warn_of_a_mask_when_the_step_uses_that_of_compute_mask():
    model = masked(MaskingByHand)
    weights = model.get_weights()
    history = fit(model, TOKENS, TARGETS)  # A warning would be an error.
    reference = masked(keras.Model)  # Keras's own masked loss.
    reference.set_weights(weights)
    reference.compile("sgd", "mse")
    close(history["error"], reference.fit(TOKENS, TARGETS, verbose=0).history["loss"])
    each_close(model.get_weights(), reference.get_weights())


def test_fit_warns_of_a_mask_of_compute_mask_that_the_step_does_not_use():
    words = r"does not use the mask (of the output|computed by compute_mask of) .*HL252"
    with pytest.warns(HandloomWarning, match=words) as warned:
        fit(masked(ForgettingItsMask), TOKENS, TARGETS)
    assert len(warned) == 2


class Adding(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.mean(x**2))
        return x


class ByHand(hl.Model):
    """Takes gradients of a loss without the penalties of its layers."""

    def loss_of(self, x, y):
        return error(self, x, y)

    def train_step(self, data):
        loss, gradients = hl.value_and_grad(lambda: self.loss_of(*data), wrt=self)()
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"error": loss}


class ByHandReportingPenalties(ByHand):
    """Reads the penalties only to report them, inside and outside of the loss."""

    def loss_of(self, x, y):
        loss = error(self, x, y)
        self.reported = sum(self.losses)
        return loss

    def train_step(self, data):
        return super().train_step(data) | {"penalty": sum(self.losses)}


class ByHandWithPenalties(ByHand):
    def loss_of(self, x, y):
        return error(self, x, y) + sum(self.losses)


def penalized(cls):
    hidden = layers.Dense(2, name="low", kernel_regularizer="l2")
    return compiled(functional(hidden, Adding(name="adding"), layers.Dense(1), inputs=2, cls=cls), "sgd")


@pytest.mark.parametrize("cls", [ByHand, ByHandReportingPenalties])
def test_fit_warns_of_penalties_in_no_loss_by_name(cls, eagerly):
    with pytest.warns(HandloomWarning) as warned:
        fit(penalized(cls), X, Y, epochs=2)
    added, regularizer = sorted(str(warning.message) for warning in warned)
    assert re.match(r"train_step does not use the losses added by 'adding'\. .*minimize\(\)", added)
    assert re.match(r"train_step does not use the regularizer of '.*low/kernel'\. .*sum\(layer.losses\)", regularizer)


@pytest.mark.parametrize("cls", [hl.Model, Forgetful, ByHandWithPenalties])
def test_fit_does_not_warn_of_penalties_in_a_loss(cls, eagerly):
    fit(penalized(cls), X, Y)


def test_fit_does_not_warn_of_penalties_on_variables_that_are_not_trained():
    class Head(hl.Model):
        def train_step(self, data):
            hidden, head = self.layers[1](data[0]), self.layers[-1]
            loss, gradients = hl.value_and_grad(lambda: error(head, hidden, data[1]), wrt=head)()
            self.optimizer.apply(gradients, head.trainable_variables)
            return {"error": loss}

    model = compiled(functional(layers.Dense(2, kernel_regularizer="l2"), layers.Dense(1), inputs=2, cls=Head))
    model.optimizer.build(model.layers[-1].trainable_variables)
    fit(model, X, Y)


def test_evaluate_does_not_warn_of_penalties_that_a_test_step_leaves_out():
    penalized(Forgetful).evaluate(X, Y, verbose=0)
