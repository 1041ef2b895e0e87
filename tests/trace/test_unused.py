"""What a compiled function forgets: masks, penalties, sample weights; and what it does by hand instead."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning
from tests.models import sequential
from tests.numbers import close, ones

TOKENS, TARGETS = np.array([[1, 2, 0], [3, 0, 0], [4, 1, 2]], "int32"), ones(3, 3, 1)
WEIGHTS = np.array([[1], [0], [2]], "float32") * ones(1, 3)


def parts(regularizer=None):
    inputs = keras.Input((3,), dtype="int32")
    embedded = layers.Embedding(5, 2, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(1, kernel_regularizer=regularizer)(embedded), name="tagger")
    return model, keras.optimizers.SGD(0.1)


def masked_mean(errors, kept):
    return ops.sum(errors[..., 0] * kept) / ops.sum(kept)


BY_HAND = {
    "tokens != 0": lambda tokens: ops.cast(tokens != 0, "float32"),
    "not_equal": lambda tokens: ops.cast(ops.not_equal(tokens, 0), "float32"),
    "where": lambda tokens: ops.where(ops.cast(tokens, "bool"), 1.0, 0.0),
    "sign": lambda tokens: ops.cast(ops.sign(tokens), "float32"),
}


@pytest.mark.parametrize("kept", BY_HAND)
@pytest.mark.parametrize("way", ["hl.fit", "hl.function"])
def test_step_that_masks_by_hand_is_not_warned_of(kept, way):
    model, optimizer = parts()
    reference = keras.models.clone_model(model)
    reference.set_weights(model.get_weights())
    kept = BY_HAND[kept]

    def step(x, y):
        return {"loss": hl.minimize(lambda: masked_mean((model(x) - y) ** 2, kept(x)), model, optimizer)}

    if way == "hl.fit":
        loss = hl.fit(step, (TOKENS, TARGETS), verbose=0).history["loss"][0]
    else:
        loss = hl.function(step)(TOKENS, TARGETS)["loss"]
    reference.compile("sgd", "mse")  # Keras's own masked loss.
    close(loss, reference.evaluate(TOKENS, TARGETS, verbose=0))


class SquaredError(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.mean((y_true - y_pred) ** 2, axis=-1)


def test_loss_of_the_user_heeds_the_mask_as_a_subclass_of_loss_and_a_function_of_keras_does_not():
    def of(loss):
        model, optimizer = parts()
        model.layers[-1].kernel.assign(ops.ones((2, 1)))
        model.layers[1].embeddings.assign(ops.ones((5, 2)))
        return hl.function(lambda x, y: hl.minimize(lambda: loss(y, model(x)), model, optimizer))

    targets = TARGETS * np.arange(3)[:, None, None].astype("float32")  # The output is 2 everywhere.
    close(of(SquaredError())(TOKENS, targets), (2 * 4 + 1 * 1 + 3 * 0) / 6)
    with pytest.warns(HandloomWarning, match=r"a loss object, .* functions in keras\.losses ignore masks\..*HL252"):
        of(lambda y, y_pred: ops.mean(keras.losses.mean_squared_error(y, y_pred)))(TOKENS, targets)


def forgetting_mask(model, optimizer):
    return lambda x, y: hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)


def forgetting_penalty(model, optimizer):
    def step(x, y):
        loss, gradients = hl.value_and_grad(lambda: keras.losses.MeanSquaredError()(y, model(x)), model)()
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return step


def forgetting_weights(model, optimizer):
    def step(x, y, sample_weight=None):
        return hl.minimize(lambda: keras.losses.MeanSquaredError()(y, model(x)), model, optimizer)

    return step


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (forgetting_mask, "does not use the mask of the output of 'tagger'.*HL252"),
        (forgetting_penalty, "does not use the regularizer of '.*kernel'.*HL253"),
        (forgetting_weights, "does not use the sample weights.*HL204"),
    ],
)
def test_function_that_trains_tells_once_what_it_forgets(make, words):
    step = hl.function(make(*parts("l2" if make is forgetting_penalty else None)))
    batch = (TOKENS, TARGETS, WEIGHTS) if make is forgetting_weights else (TOKENS, TARGETS)
    with pytest.warns(HandloomWarning, match=words):
        step(*batch)
    step(*(part[:2] for part in batch))  # A warning would be an error.


def test_function_that_does_not_train_or_uses_everything_is_not_warned_of():
    model, optimizer = parts("l2")

    def weighed(x, y, sample_weight=None):
        return hl.minimize(lambda: keras.losses.MeanSquaredError()(y, model(x), sample_weight), model, optimizer)

    hl.function(lambda x, y: ops.mean((model(x) - y) ** 2))(TOKENS, TARGETS)
    hl.function(weighed)(TOKENS, TARGETS)
    hl.function(weighed)(TOKENS, TARGETS, WEIGHTS)


def test_fit_names_the_penalties_that_it_forgets_in_one_warning():
    model = sequential(*(layers.Dense(2, kernel_regularizer="l2", name=name) for name in "abcde"))
    optimizer = keras.optimizers.SGD(0.1)

    def step(x, y):
        loss, gradients = hl.value_and_grad(lambda: ops.mean(model(x) - y), model)()
        optimizer.apply(gradients, model.trainable_variables)
        return {"loss": loss}

    words = "does not use the regularizer of '.*a/kernel', '.*b/kernel', '.*c/kernel' and 2 more.*HL253"
    with pytest.warns(HandloomWarning, match=words) as told:
        hl.fit(step, (ones(4, 3), ones(4, 2)), verbose=0)
    assert len(told) == 1


def test_fit_of_a_part_with_the_penalties_of_the_rest_is_not_warned_of():
    model, optimizer = parts()
    model.layers[1].activity_regularizer = keras.regularizers.L2(1.0)

    def step(x, y):
        loss = keras.losses.MeanSquaredError()
        return {"loss": hl.minimize(lambda: loss(y, model(x)) + sum(model.losses), model.layers[-1], optimizer)}

    model.compile("sgd", "mse")
    right = model.evaluate(TOKENS, TARGETS, verbose=0)
    close(hl.fit(step, (TOKENS, TARGETS), verbose=0).history["loss"][0], right)
