"""Sample weights: bad ones are errors, and those that a step does not use are told of."""

import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import DataError, HandloomWarning

X = np.arange(24, dtype="float32").reshape(12, 2)
Y = X.sum(axis=1, keepdims=True)
WEIGHTS = np.ones(12, "float32")


def model_of(cls=hl.Model):
    inputs = keras.Input((2,))
    model = cls(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", loss="mse")
    return model


def with_weight(value, place=5):
    weights = WEIGHTS.copy()
    weights[place] = value
    return weights


# ------------------------------------------------------------------------ bad weights


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_a_weight_that_is_negative_or_not_finite_is_an_error(method, value):
    quiet = {"verbose": 0} if method in ("fit", "evaluate") else {}
    model = model_of()
    before = model.get_weights()
    with pytest.raises(DataError, match=rf"sample_weight has 1 value.*the first is {value} at \[5\].*advantages"):
        getattr(model, method)(X, Y, sample_weight=with_weight(value), **quiet)
    for weight, as_before in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, as_before)


def test_a_negative_weight_of_a_source_of_batches_is_an_error():
    batches = [(X[:6], Y[:6], WEIGHTS[:6]), (X[6:], Y[6:], with_weight(-1, 7)[6:])]
    with pytest.raises(DataError, match=r"the first is -1.0 at \[1\]"):
        model_of().fit(batches_of(batches), verbose=0)
    with pytest.raises(DataError, match=r"the first is -1.0 at \[1\]"):
        model_of().evaluate(batches_of(batches), verbose=0)


def batches_of(batches):
    return lambda: iter(batches)


@pytest.mark.parametrize("source", [lambda data: data, lambda data: lambda: iter([data])], ids=["arrays", "batches"])
def test_the_weights_in_a_feed_are_checked(source):
    x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
    negative = hl.Feed(source((x, y, np.array([1, 1, -2, 1], "float32"))))
    nothing = hl.Feed(source((x, y, np.zeros(4, "float32"))))
    model = hl.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(DataError, match=r"negative or not finite; the first is -2\.0 at \[2\]"):
        model.fit(negative, verbose=0)
    with pytest.raises(DataError, match="sums to zero"):
        model.fit(nothing, verbose=0)
    assert model.evaluate(nothing, verbose=0) == 0  # As it is of arrays.


def test_a_negative_weight_of_validation_data_is_an_error_before_training():
    model = model_of()
    with pytest.raises(DataError, match="negative"):
        model.fit(X, Y, validation_data=(X, Y, with_weight(-1)), verbose=0)
    assert model.optimizer.iterations == 0


def test_a_negative_weight_for_a_plain_step_is_an_error():
    def step(x, sample_weight):
        return {"mean": ops.sum(x[:, 0] * sample_weight)}

    with pytest.raises(DataError, match=r"the first is -2.0 at \[5\]"):
        hl.fit(step, (X, with_weight(-2)), verbose=0)
    feed = hl.Feed((X, with_weight(-2)))
    with pytest.raises(DataError, match="sample_weight"):
        hl.fit(step, feed, verbose=0)
    assert len(list(feed)) == 1  # By itself the feed is not checked.
    with pytest.raises(DataError, match=r"the first is -2.0 at \[5\]"):
        hl.fit(lambda x: {"x": ops.sum(x)}, X, validate=(step, (X, with_weight(-2))), verbose=0)


@pytest.mark.parametrize("class_weight", [{0: -1.0}, {0: np.nan}, {0: np.inf}])
def test_a_bad_class_weight_is_an_error(class_weight):
    with pytest.raises(DataError, match=r"class_weight takes finite numbers, 0 or more; received \{0: "):
        model_of().fit(X, np.zeros((12, 1)), class_weight=class_weight, verbose=0)


def test_weights_that_sum_to_zero_in_a_batch_are_an_error_in_training():
    weights = np.repeat([1.0, 0.0], 6).astype("float32")
    words = re.escape("The sample_weight of a batch of 3 examples sums to zero") + ".*keep = sample_weight > 0"
    model = model_of()
    with pytest.raises(DataError, match=words):
        model.fit(X, Y, sample_weight=weights, batch_size=3, shuffle=False, verbose=0)
    with pytest.raises(DataError, match=words):
        model.fit(batches_of([(X[:3], Y[:3], weights[6:9])]), verbose=0)
    with pytest.raises(DataError, match="of 12 examples sums to zero"):
        model.train_on_batch(X, Y, sample_weight=0 * weights)
    with pytest.raises(DataError, match=words):
        hl.fit(lambda x, sample_weight: {"x": ops.sum(sample_weight)}, batches_of([(X[:3], weights[6:9])]), verbose=0)
    history = model.fit(X, Y, sample_weight=weights, batch_size=12, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_the_cure_in_the_message_works():
    weights = np.repeat([1.0, 0.0], 6).astype("float32")
    keep = weights > 0
    model_of().fit(X[keep], Y[keep], sample_weight=weights[keep], batch_size=3, verbose=0)


def test_weights_that_sum_to_zero_in_a_batch_are_no_error_in_evaluation():
    # Divided by the number of examples, as Keras does it, the loss is defined.
    weights = np.repeat([1.0, 0.0], 6).astype("float32")
    model = model_of()
    model.set_weights([np.zeros((2, 1)), np.zeros(1)])
    loss = model.evaluate(X, Y, sample_weight=weights, batch_size=3, verbose=0)
    np.testing.assert_allclose(loss, (weights * Y[:, 0] ** 2).mean(), rtol=1e-6)


def test_one_output_of_several_may_weigh_nothing():
    inputs = keras.Input((2,))
    model = hl.Model(inputs, {"a": layers.Dense(1, name="a")(inputs), "b": layers.Dense(1, name="b")(inputs)})
    model.compile("sgd", loss="mse")
    y = {"a": Y, "b": Y}
    model.fit(X, y, sample_weight={"a": WEIGHTS, "b": 0 * WEIGHTS}, verbose=0)
    with pytest.raises(DataError, match="sums to zero"):
        model.fit(X, y, sample_weight={"a": 0 * WEIGHTS, "b": 0 * WEIGHTS}, verbose=0)
    with pytest.raises(DataError, match="negative"):
        model.fit(X, y, sample_weight={"a": WEIGHTS, "b": with_weight(-1)}, verbose=0)


# ------------------------------------------------------------ given and never used


class Forgetful(hl.Model):
    """Takes the weights out of the batch and forgets them."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        return {"error": self.minimize(lambda: ops.mean((self(x) - y) ** 2))}

    def test_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        return {"error": ops.mean((self(x) - y) ** 2)}


class Mindful(hl.Model):
    def train_step(self, data):
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        return {"error": self.minimize(lambda: ops.mean(weight[:, None] * (self(x) - y) ** 2))}


def test_weights_that_a_step_does_not_use_are_told_of_once():
    model = model_of(Forgetful)
    with pytest.warns(HandloomWarning, match=r"train_step does not use the sample weights\. .*compute_loss") as told:
        model.fit(X, Y, sample_weight=WEIGHTS, epochs=2, batch_size=5, verbose=0)
    assert len(told) == 1
    with pytest.warns(HandloomWarning, match="test_step does not use the sample weights"):
        model.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0)


def test_class_weights_are_sample_weights_too():
    with pytest.warns(HandloomWarning, match="train_step does not use the sample weights"):
        model_of(Forgetful).fit(X, np.zeros((12, 1)), class_weight={0: 2.0}, verbose=0)


def test_weights_that_are_not_given_are_not_missed():
    model_of(Forgetful).fit(X, Y, verbose=0)


@pytest.mark.parametrize("cls", [hl.Model, Mindful])
def test_weights_that_a_step_uses_are_not_spoken_of(cls):
    model_of(cls).fit(X, Y, sample_weight=WEIGHTS, verbose=0)


def test_weights_in_a_metric_alone_are_used():
    class InMetric(Forgetful):
        def train_step(self, data):
            x, y, weight = data
            loss = self.minimize(lambda: ops.mean((self(x) - y) ** 2))
            self.seen.update_state(y, sample_weight=weight)
            return {"error": loss, "seen": self.seen}

    model = model_of(InMetric)
    model.seen = keras.metrics.Mean(name="seen")
    model.fit(X, Y, sample_weight=WEIGHTS, verbose=0)


def test_weights_of_one_output_of_several_do_for_all():
    class OfA(hl.Model):
        def train_step(self, data):
            x, y, weight = data
            return {"error": self.minimize(lambda: ops.mean(weight["a"][:, None] * (self(x)["a"] - y["a"]) ** 2))}

    inputs = keras.Input((2,))
    model = OfA(inputs, {"a": layers.Dense(1)(inputs)})
    model.compile("sgd")
    model.fit(X, {"a": Y, "b": Y}, sample_weight={"a": WEIGHTS, "b": WEIGHTS}, verbose=0)


def test_a_plain_step_is_told_of_its_weights_too():
    def step(x, sample_weight):
        return {"mean": ops.mean(x)}

    with pytest.warns(HandloomWarning, match="step does not use the sample weights"):
        hl.fit(step, (X, WEIGHTS), verbose=0)


def test_a_third_part_that_is_no_weight_is_neither_refused_nor_missed():
    class Triplets(hl.Model):
        def train_step(self, data):
            anchor, positive, negative = data

            def loss_fn():
                return ops.mean((self(anchor) - self(positive)) ** 2) - ops.mean(self(negative))

            return {"error": self.minimize(loss_fn)}

    model_of(Triplets).fit(batches_of([(X, X + 1, X - 9)]), verbose=0)


def test_op_by_op_nothing_is_known_and_nothing_said(eagerly):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model_of(Forgetful).fit(X, Y, sample_weight=WEIGHTS, verbose=0)
    assert len(told) == (0 if eagerly else 1)


# ------------------------------------------------------------- masks, penalties


def masked_model(cls):
    inputs = keras.Input((3,), dtype="int32")
    embedded = layers.Embedding(5, 2, mask_zero=True)(inputs)
    model = cls(inputs, layers.Dense(1, name="head")(embedded))
    model.compile("sgd", loss="mse")
    return model


TOKENS = np.array([[1, 2, 0], [3, 0, 0], [4, 1, 2]], "int32")
TARGETS = np.ones((3, 3, 1), "float32")


class MaskForgotten(hl.Model):
    def train_step(self, data):
        x, y = data
        return {"error": self.minimize(lambda: ops.mean((self(x) - y) ** 2))}


class MaskUsed(hl.Model):
    def train_step(self, data):
        x, y = data
        mse = keras.losses.MeanSquaredError()
        return {"error": self.minimize(lambda: mse(y, self(x)))}


def test_a_mask_that_a_step_does_not_use_is_told_of_by_name():
    model = masked_model(MaskForgotten)
    words = f"train_step does not use the mask of the output of '{model.name}'\\. .*compute_mask"
    with pytest.warns(HandloomWarning, match=words) as told:
        model.fit(TOKENS, TARGETS, epochs=2, verbose=0)
    assert len(told) == 1


@pytest.mark.parametrize("cls", [hl.Model, MaskUsed])
def test_a_mask_that_a_loss_heeds_is_not_spoken_of(cls):
    masked_model(cls).fit(TOKENS, TARGETS, verbose=0)


class Adding(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.mean(x**2))
        return x


class ByHand(hl.Model):
    """Gradients of a loss that its layers' penalties are not in."""

    penalties = False

    def train_step(self, data):
        x, y = data

        def loss_fn():
            error = ops.mean((self(x) - y) ** 2)
            return error + sum(self.losses) if self.penalties else error

        loss, gradients = hl.value_and_grad(loss_fn, wrt=self)()
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"error": loss}


def penalized(cls):
    inputs = keras.Input((2,))
    hidden = Adding(name="adding")(layers.Dense(2, name="low", kernel_regularizer="l2")(inputs))
    model = cls(inputs, layers.Dense(1)(hidden))
    model.compile("sgd", loss="mse")
    return model


def test_penalties_in_no_loss_are_told_of_by_name(eagerly):
    with pytest.warns(HandloomWarning) as told:
        penalized(ByHand).fit(X, Y, epochs=2, verbose=0)
    said = sorted(str(warning.message) for warning in told)
    assert len(said) == 2
    assert re.match(r"train_step does not use the losses added by 'adding'\. .*minimize\(\)", said[0])
    assert re.match(r"train_step does not use the regularizer of '.*low/kernel'\. .*sum\(layer.losses\)", said[1])


@pytest.mark.parametrize("cls", [hl.Model, Forgetful, type("WithLosses", (ByHand,), {"penalties": True})])
def test_penalties_in_a_loss_are_not_spoken_of(cls, eagerly):
    penalized(cls).fit(X, Y, verbose=0)


def test_what_is_not_trained_need_not_be_penalized():
    class Head(hl.Model):
        def train_step(self, data):
            x, y = data
            hidden = self.layers[1](x)
            head = self.layers[-1]
            loss, gradients = hl.value_and_grad(lambda: ops.mean((head(hidden) - y) ** 2), wrt=head)()
            self.optimizer.apply(gradients, head.trainable_variables)
            return {"error": loss}

    inputs = keras.Input((2,))
    model = Head(inputs, layers.Dense(1)(layers.Dense(2, kernel_regularizer="l2")(inputs)))
    model.compile("sgd")
    model.optimizer.build(model.layers[-1].trainable_variables)
    model.fit(X, Y, verbose=0)


def test_a_test_step_may_leave_penalties_out():
    class ErrorAlone(hl.Model):
        def test_step(self, data):
            x, y = data
            return {"error": ops.mean((self(x) - y) ** 2)}

    penalized(ErrorAlone).evaluate(X, Y, verbose=0)
