"""`hl.Model` without a step of its own against `keras.Model`: same weights, data and arguments, same numbers."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype("float32")
Y = (X @ [[1.0], [-2.0], [0.5]] + 0.1 * X[:, :1] ** 2).astype("float32")
LABELS = (X.sum(axis=1) > 0).astype("int32") + (X[:, 0] > 0.5)
TOKENS = RNG.integers(0, 5, size=(40, 6))
# In each batch the weights sum to its number of examples. Else means over an epoch differ: ours are weighted by them.
WEIGHTS = np.tile([0.5, 1.5, 0.25, 1.75, 1.0, 1.0, 2.0, 0.0], 5).astype("float32")


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(0.05 * ops.mean(x**2))
        return x


def mlp(cls):
    inputs = keras.Input((3,))
    return cls(inputs, layers.Dense(1)(layers.Dense(4, "tanh")(inputs)))


def classifier(cls):
    inputs = keras.Input((3,))
    return cls(inputs, layers.Dense(3, "softmax")(inputs))


def penalized(cls):
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, use_bias=False, kernel_regularizer="l2", activity_regularizer="l1")(inputs)
    hidden = Penalty()(layers.BatchNormalization()(hidden))
    return cls(inputs, layers.Dense(1, bias_regularizer="l1", kernel_constraint="unit_norm")(hidden))


def with_added_loss_alone(cls):
    inputs = keras.Input((3,))
    return cls(inputs, Penalty()(layers.Dense(2)(inputs)))


def by_name(cls):
    inputs = {"left": keras.Input((3,), name="left"), "right": keras.Input((1,), name="right")}
    both = layers.Concatenate()([inputs["left"], inputs["right"]])
    value = layers.Dense(1, name="value")(both)
    kind = layers.Dense(3, "softmax", name="kind")(both)
    return cls(inputs, {"value": value, "kind": kind})


def in_order(cls):
    left, right = keras.Input((3,)), keras.Input((1,))
    both = layers.Concatenate()([left, right])
    return cls([left, right], [layers.Dense(1, name="a")(both), layers.Dense(1, name="b")(both)])


def tagger(cls):
    inputs = keras.Input((None,), dtype="int32")
    embedded = layers.Embedding(5, 3, mask_zero=True)(inputs)
    return cls(inputs, layers.Dense(5, "softmax")(embedded))


def with_own_methods(cls):
    class Own(cls):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):  # Before Keras 3.3, no `training`.
            return ops.mean(ops.abs(y - y_pred) ** 3)

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return super().compute_metrics(x, y, y_pred, sample_weight) | {"constant": ops.ones(())}

    model = Own()
    model(X)
    return model


def absolute_error(y, y_pred):
    return ops.abs(y - y_pred)[:, 0]


MSE = {"optimizer": "sgd", "loss": "mse"}
SPARSE = {"optimizer": "sgd", "loss": "sparse_categorical_crossentropy"}
NAMED = {"optimizer": "sgd", "loss": {"value": "mse", "kind": "sparse_categorical_crossentropy"}}
LISTED = {"optimizer": "sgd", "loss": ["mse", "mae"]}

CASES = {
    "metrics and a last smaller batch": (
        mlp,
        MSE | {"metrics": ["mae", keras.metrics.RootMeanSquaredError]},
        X,
        Y,
        {"batch_size": 25},
    ),
    "sample weights": (mlp, MSE | {"metrics": ["mae"], "weighted_metrics": ["mae"]}, X, Y, {"sample_weight": WEIGHTS}),
    "labels with class weights": (
        classifier,
        SPARSE | {"metrics": ["accuracy"], "weighted_metrics": ["accuracy"]},
        X,
        LABELS,
        {"class_weight": {0: 0.5, 1: 3.0}, "batch_size": 40},
    ),
    "inputs and outputs by name": (
        by_name,
        NAMED | {"loss_weights": {"value": 0.3, "kind": 2.0}, "metrics": {"value": "mae", "kind": ["accuracy"]}},
        {"left": X, "right": Y},
        {"value": Y, "kind": LABELS},
        {},
    ),
    "inputs and outputs in order, with weights": (
        in_order,
        LISTED | {"weighted_metrics": [["mse"], ["mae"]], "loss_weights": [0.2, 0.8]},
        [X, Y],
        [Y, -Y],
        {"sample_weight": [WEIGHTS, 2 - WEIGHTS]},
    ),
    "penalties": (penalized, MSE, X, Y, {}),
    "added losses alone": (with_added_loss_alone, {"optimizer": "sgd"}, X, None, {}),
    "masks": (tagger, SPARSE, TOKENS, TOKENS, {}),
    "a loss that is a function": (mlp, {"optimizer": "sgd", "loss": absolute_error}, X, Y, {}),
    "own methods": (with_own_methods, MSE | {"metrics": ["mae"]}, X, Y, {}),
}


def pair(build, options):
    """A model of Keras and one of ours, alike; Keras's runs op by op, which on JAX and TensorFlow is quicker here."""
    keras.utils.set_random_seed(1)
    theirs, ours = build(keras.Model), build(hl.Model)
    ours.set_weights(theirs.get_weights())
    theirs.compile(**fresh(options))
    ours.compile(**fresh(options))
    return theirs, ours


def fresh(options):
    """Options with metrics, losses and optimizers of their own."""
    if callable(options):
        return options()
    return keras.tree.map_structure(lambda item: item() if isinstance(item, type) else item, options)


def assert_alike(theirs, ours, rtol=1e-5):
    assert set(theirs) == set(ours)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-6, err_msg=name)


def assert_same_weights(theirs, ours):
    for one, other in zip(theirs.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_default_step_trains_and_reports_as_keras_does(case):
    build, options, x, y, extra = CASES[case]
    theirs, ours = pair(build, options)
    arguments = {"batch_size": 20, "epochs": 2, "shuffle": False, "verbose": 0} | extra
    assert_alike(theirs.fit(x, y, **arguments).history, ours.fit(x, y, **arguments).history)
    assert_same_weights(theirs, ours)


def decaying(rate):
    return keras.optimizers.schedules.ExponentialDecay(rate, 2, 0.5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(decaying(0.1), momentum=0.9, nesterov=True, clipnorm=0.5),
        lambda: keras.optimizers.AdamW(
            0.01, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=3, global_clipnorm=1.0
        ),
    ],
    ids=["nesterov, schedule, clipnorm", "weight decay, ema, global clipnorm"],
)
def test_an_optimizer_steps_as_in_keras(optimizer):
    theirs, ours = pair(mlp, lambda: {"optimizer": optimizer(), "loss": "mse"})
    for model in (theirs, ours):
        model.fit(X, Y, batch_size=10, shuffle=False, verbose=0)
    assert_same_weights(theirs, ours)
    for one, other in zip(theirs.optimizer.variables, ours.optimizer.variables, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(other), ops.convert_to_numpy(one), rtol=1e-4, atol=1e-6)


VALIDATIONS = {
    "weights and another batch size": {"validation_data": (X, Y, WEIGHTS), "validation_batch_size": 40},
    "a split and a number of steps": {"validation_split": 0.5, "validation_batch_size": 10, "validation_steps": 1},
}


@pytest.mark.parametrize("validation", VALIDATIONS)
def test_validation_is_reported_as_by_keras(validation):
    theirs, ours = pair(mlp, MSE | {"weighted_metrics": ["mae"]})
    arguments = {"batch_size": 20, "shuffle": False, "verbose": 0} | VALIDATIONS[validation]
    assert_alike(theirs.fit(X, Y, **arguments).history, ours.fit(X, Y, **arguments).history)


FORMATS = {
    "one value": (mlp, MSE, X, Y),
    "several outputs": (
        by_name,
        NAMED | {"metrics": {"value": ["mae"], "kind": "accuracy"}},
        {"left": X, "right": Y},
        {"value": Y, "kind": LABELS},
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_evaluate_and_the_methods_on_a_batch_return_what_keras_does(case):
    build, options, x, y = FORMATS[case]
    theirs, ours = pair(build, options)
    arguments = {"batch_size": 40, "verbose": 0}
    expected = theirs.evaluate(x, y, **arguments)
    for returned in (ours.evaluate(x, y, **arguments), ours.test_on_batch(x, y), ours.train_on_batch(x, y)):
        assert type(returned) is (float if case == "one value" else list)
        np.testing.assert_allclose(returned, expected, rtol=1e-5)
    expected = theirs.evaluate(x, y, **arguments, return_dict=True)
    ours.set_weights(theirs.get_weights())
    assert_alike(expected, ours.evaluate(x, y, **arguments, return_dict=True))
    assert_alike(expected, ours.test_on_batch(x, y, return_dict=True))
    assert_alike(expected, ours.train_on_batch(x, y, return_dict=True))


def test_a_metric_reports_each_batch_anew_on_batches():
    _, ours = pair(mlp, MSE | {"metrics": ["mae"]})
    alone = ours.test_on_batch(X[:20], Y[:20])
    ours.test_on_batch(X[20:], Y[20:])
    assert ours.test_on_batch(X[:20], Y[:20]) == alone


@pytest.mark.parametrize("build", [by_name, in_order], ids=["a dict", "a list"])
def test_predictions_have_the_structure_and_values_of_keras(build):
    theirs, ours = pair(build, MSE)
    x = {"left": X, "right": Y} if build is by_name else [X, Y]
    expected, predicted = theirs.predict_on_batch(x), ours.predict(x, batch_size=25, verbose=0)
    keras.tree.assert_same_structure(predicted, expected)
    keras.tree.map_structure(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), predicted, expected)
    assert all(type(leaf) is np.ndarray for leaf in keras.tree.flatten(predicted))
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours.predict_on_batch(x), predicted
    )


def test_a_mask_reaches_the_metrics_in_training_as_in_evaluation():
    """Keras itself loses it in training on JAX."""
    _, ours = pair(tagger, SPARSE | {"metrics": ["accuracy"], "weighted_metrics": ["sparse_categorical_crossentropy"]})
    ours.optimizer.learning_rate = 0.0
    probabilities, real = ours.predict(TOKENS, verbose=0), TOKENS != 0
    accuracy = (probabilities.argmax(-1) == TOKENS)[real].mean()
    crossentropy = -np.log(np.take_along_axis(probabilities, TOKENS[..., None], -1)[..., 0])[real].mean()
    trained = ours.fit(TOKENS, TOKENS, batch_size=40, verbose=0).history
    tested = ours.evaluate(TOKENS, TOKENS, batch_size=40, verbose=0, return_dict=True)
    for logs in (trained, tested):
        np.testing.assert_allclose(logs["accuracy"], accuracy, rtol=1e-5)
        np.testing.assert_allclose(logs["sparse_categorical_crossentropy"], crossentropy, rtol=1e-5)


class WithLossReturned(hl.Model):
    def test_step(self, data):
        x, y, weights = data
        return {"loss": self.compute_loss(x, y, self(x), weights)}


@pytest.mark.parametrize("cls", [hl.Model, WithLossReturned])
def test_a_weighted_loss_over_several_batches_is_keras_s(cls):
    """Keras divides a weighted loss by the examples; so is its mean over batches, also as a step returns it."""
    weights = np.linspace(0, 3, 40, dtype="float32")
    model = mlp(cls)
    model.compile(**MSE)
    squares = (model.predict(X, verbose=0) - Y)[:, 0] ** 2
    reported = model.evaluate(X, Y, batch_size=25, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(reported, np.mean(squares * weights), rtol=1e-5)


@pytest.mark.parametrize("cls", [hl.Model, WithLossReturned])
def test_a_loss_divided_by_its_weights_is_over_several_batches_too(cls):
    weights = np.linspace(0, 3, 40, dtype="float32")
    model = mlp(cls)
    model.compile(loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    squares = (model.predict(X, verbose=0) - Y)[:, 0] ** 2
    reported = model.evaluate(X, Y, batch_size=25, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(reported, np.average(squares, weights=weights), rtol=1e-5)
