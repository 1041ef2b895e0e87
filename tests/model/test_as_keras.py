"""`hl.Model` with its default steps gives the numbers of `keras.Model`, from the same weights, data and arguments."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.conftest import BACKEND
from tests.models import compiled, fit, functional
from tests.numbers import close, each_close, normal

X = normal(40, 3)
Y = (X @ [[1.0], [-2.0], [0.5]] + 0.1 * X[:, :1] ** 2).astype("float32")
LABELS = (X.sum(axis=1) > 0).astype("int32") + (X[:, 0] > 0.5)
TOKENS = np.random.default_rng(0).integers(0, 5, size=(40, 6))
# The weights of each batch sum to its number of examples. Otherwise the means of an epoch differ: ours are weighted.
WEIGHTS = np.tile([0.5, 1.5, 0.25, 1.75, 1.0, 1.0, 2.0, 0.0], 5).astype("float32")


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(0.05 * ops.mean(x**2))
        return x


def mlp(cls):
    return functional(layers.Dense(4, "tanh"), layers.Dense(1), cls=cls)


def classifier(cls):
    return functional(layers.Dense(3, "softmax"), cls=cls)


def penalized(cls):
    hidden = layers.Dense(4, use_bias=False, kernel_regularizer="l2", activity_regularizer="l1")
    head = layers.Dense(1, bias_regularizer="l1", kernel_constraint="unit_norm")
    return functional(hidden, layers.BatchNormalization(), Penalty(), head, cls=cls)


def with_added_loss_alone(cls):
    return functional(layers.Dense(2), Penalty(), cls=cls)


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
    """A `keras.Model` and an `hl.Model` with the same weights."""
    keras.utils.set_random_seed(1)
    theirs, ours = build(keras.Model), build(hl.Model)
    ours.set_weights(theirs.get_weights())
    theirs.compile(**fresh(options))
    ours.compile(**fresh(options))
    return theirs, ours


def fresh(options):
    """The options, with new metrics."""
    return keras.tree.map_structure(lambda item: item() if isinstance(item, type) else item, options)


def assert_alike(theirs, ours):
    assert set(theirs) == set(ours)
    for name in theirs:
        close(ours[name], theirs[name])


@pytest.mark.parametrize("case", CASES)
def test_fit_trains_and_reports_as_keras_does(case):
    build, options, x, y, extra = CASES[case]
    theirs, ours = pair(build, options)
    arguments = {"batch_size": 20, "epochs": 2} | extra
    assert_alike(fit(theirs, x, y, **arguments), fit(ours, x, y, **arguments))
    each_close(ours.get_weights(), theirs.get_weights())


def decaying(rate):
    return keras.optimizers.schedules.ExponentialDecay(rate, 2, 0.5)


OPTIMIZERS = {
    "schedule": keras.optimizers.SGD(decaying(0.1), momentum=0.9, nesterov=True, clipnorm=0.5),
    "averages": keras.optimizers.AdamW(
        0.01, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=3, global_clipnorm=1.0
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fit_uses_an_optimizer_as_keras_does(kind):
    theirs, ours = pair(mlp, MSE | {"optimizer": keras.optimizers.serialize(OPTIMIZERS[kind])})
    for model in (theirs, ours):
        fit(model, X, Y, batch_size=10)
    each_close(ours.get_weights(), theirs.get_weights())
    each_close(ours.optimizer.variables, theirs.optimizer.variables, rtol=1e-4)


VALIDATIONS = {
    "weights and another batch size": {"validation_data": (X, Y, WEIGHTS), "validation_batch_size": 40},
    "a split and a number of steps": {"validation_split": 0.5, "validation_batch_size": 10, "validation_steps": 1},
}


@pytest.mark.parametrize("validation", VALIDATIONS)
def test_fit_reports_validation_as_keras_does(validation):
    theirs, ours = pair(mlp, MSE | {"weighted_metrics": ["mae"]})
    arguments = {"batch_size": 20} | VALIDATIONS[validation]
    assert_alike(fit(theirs, X, Y, **arguments), fit(ours, X, Y, **arguments))


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
def test_evaluate_test_on_batch_and_train_on_batch_return_what_keras_does(case):
    build, options, x, y = FORMATS[case]
    theirs, ours = pair(build, options)
    arguments = {"batch_size": 40, "verbose": 0}
    expected = theirs.evaluate(x, y, **arguments)
    for returned in (ours.evaluate(x, y, **arguments), ours.test_on_batch(x, y), ours.train_on_batch(x, y)):
        assert type(returned) is (float if case == "one value" else list)
        close(returned, expected)
    expected = theirs.evaluate(x, y, **arguments, return_dict=True)
    ours.set_weights(theirs.get_weights())
    assert_alike(expected, ours.evaluate(x, y, **arguments, return_dict=True))
    assert_alike(expected, ours.test_on_batch(x, y, return_dict=True))
    assert_alike(expected, ours.train_on_batch(x, y, return_dict=True))


def test_test_on_batch_resets_metrics_before_each_batch():
    _, ours = pair(mlp, MSE | {"metrics": ["mae"]})
    alone = ours.test_on_batch(X[:20], Y[:20])
    ours.test_on_batch(X[20:], Y[20:])
    assert ours.test_on_batch(X[:20], Y[:20]) == alone


@pytest.mark.parametrize("build", [by_name, in_order], ids=["a dict", "a list"])
def test_predict_and_predict_on_batch_return_the_structure_and_values_of_keras(build):
    theirs, ours = pair(build, MSE)
    x = {"left": X, "right": Y} if build is by_name else [X, Y]
    expected = theirs.predict_on_batch(x)
    for predicted in (ours.predict(x, batch_size=25, verbose=0), ours.predict_on_batch(x)):
        keras.tree.assert_same_structure(predicted, expected)
        keras.tree.map_structure(close, predicted, expected)
        assert all(type(leaf) is np.ndarray for leaf in keras.tree.flatten(predicted))


def test_fit_gives_metrics_the_mask_as_evaluate_does():
    """Keras loses the mask in training on JAX."""
    _, ours = pair(tagger, SPARSE | {"metrics": ["accuracy"], "weighted_metrics": ["sparse_categorical_crossentropy"]})
    ours.optimizer.learning_rate = 0.0
    probabilities, real = ours.predict(TOKENS, verbose=0), TOKENS != 0
    accuracy = (probabilities.argmax(-1) == TOKENS)[real].mean()
    crossentropy = -np.log(np.take_along_axis(probabilities, TOKENS[..., None], -1)[..., 0])[real].mean()
    evaluated = ours.evaluate(TOKENS, TOKENS, batch_size=40, verbose=0, return_dict=True)
    for logs in (fit(ours, TOKENS, TOKENS, batch_size=40), evaluated):
        close(logs["accuracy"], accuracy)
        close(logs["sparse_categorical_crossentropy"], crossentropy)


def test_fit_evaluate_and_batch_logs_order_their_values_as_keras_does():
    x, y, seen = normal(8, 3), ops.ones((8, 1)), []
    for cls in (keras.Model, hl.Model):
        orders = []

        def note(_, logs, orders=orders):
            orders.append(list(logs))

        note_all = keras.callbacks.LambdaCallback(on_train_batch_end=note, on_epoch_end=note)
        model = compiled(functional(cls=cls), metrics=["mse", "accuracy"], weighted_metrics=["mae"])
        orders.append(list(fit(model, x, y, validation_data=(x, y), callbacks=[note_all])))
        orders.append(list(model.evaluate(x, y, verbose=0, return_dict=True)))
        seen.append(orders)
    assert seen[1] == seen[0]
    assert seen[1][0][:2] == ["accuracy", "loss"]


class MadeInBuild(layers.Layer):
    """Makes a layer when it is built, which is built at its first call."""

    def build(self, _):
        self.inner = layers.Dense(2)

    def call(self, x):
        return self.inner(x)


@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_initializes_layers_that_it_builds_as_keras_does(shuffle, eagerly):
    kernels = []
    for cls in (keras.Sequential, hl.Sequential):
        keras.utils.set_random_seed(1)
        model = compiled(cls([MadeInBuild(), layers.Dense(1)]), keras.optimizers.SGD(0.0))
        model.fit(X, Y, shuffle=shuffle, epochs=1, verbose=0)
        later = layers.Dense(1)  # Its seed is the next one.
        later.build((None, 2))
        kernels.append([model.layers[0].inner.kernel, later.kernel])
    each_close(*kernels)


# ------------------------------------------------------------------ where Keras differs between backends or methods


@pytest.mark.parametrize(
    ("make", "expected", "of_keras"),
    [
        # The second moment of the sum of two gradients g is (2g)^2; Keras adds up their squares, 2g^2.
        (lambda: keras.optimizers.RMSprop(0.1, rho=0.75), 0.1 / 0.25**0.5, 2**0.5 * 0.1 / 0.25**0.5),
        (lambda: keras.optimizers.Adam(0.1), 0.1, 2**0.5 * 0.1),
    ],
    ids=["RMSprop", "Adam"],
)
def test_fit_adds_up_the_gradients_of_a_token_that_occurs_twice_before_it_squares_them(make, expected, of_keras):
    for cls, step in ((hl.Model, expected), (keras.Model, of_keras if BACKEND == "tensorflow" else expected)):
        embedding = layers.Embedding(2, 1, embeddings_initializer="ones")
        compiled(functional(embedding, inputs=2, cls=cls), make(), "mse").fit(
            np.array([[0, 0]]), np.zeros((1, 2, 1)), verbose=0
        )
        close(embedding.embeddings, [[1 - step], [1]], rtol=1e-4)


def test_fit_counts_masked_tokens_in_no_metric_as_evaluate_does():
    x, y = np.array([[1, 2, 3, 0, 0, 0]]), np.array([[1, 0, 0, 1, 1, 1]])  # Right: one of three tokens, of six in all.
    for cls, trained in ((hl.Model, 1 / 3), (keras.Model, 1 / 6 if BACKEND == "jax" else 1 / 3)):
        embedding = layers.Embedding(4, 4, embeddings_initializer="identity", mask_zero=True)
        model = functional(embedding, inputs=6, cls=cls)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        compiled(model, keras.optimizers.SGD(0.0), loss, metrics=["accuracy"])
        close(fit(model, x, y)["accuracy"], [trained])
        close(model.evaluate(x, y, return_dict=True, verbose=0)["accuracy"], 1 / 3)
