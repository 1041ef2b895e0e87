"""`fit`, `evaluate` and `train_on_batch`: the third part of a batch is sample weights where the user says so."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.utils import unpack_x_y_sample_weight

import handloom as hl
from tests.numbers import close, numpy

RANDOM = np.random.default_rng(0)
X, Y = (RANDOM.normal(size=(10, width)).astype("float32") for width in (3, 1))
WEIGHTS = np.arange(1, 11, dtype="float32")
THIRDS = {
    "vectors": RANDOM.normal(size=(10, 3)).astype("float32"),
    "a negative column": -RANDOM.uniform(1, 2, (10, 1)).astype("float32"),
    "negative numbers": -RANDOM.uniform(1, 2, 10).astype("float32"),
    "ids": np.arange(10, dtype="int32"),
    "zeros": np.zeros(10, "float32"),
}
CUTS = [slice(0, 4), slice(4, 8), slice(8, 10)]

# Arrays of a known length, and a source that gives one batch after the other.
SOURCES = {
    "a feed over arrays": lambda *parts: hl.Feed(parts, batch_size=4),
    "a generator": lambda *parts: lambda: (tuple(part[cut] for part in parts) for cut in CUTS),
}


def value_of(x, y, _):
    return ops.mean(x) + 2 * ops.mean(y)


def unpack(data):
    return keras.utils.unpack_x_y_sample_weight(data)


class Own(hl.Model):
    """A model whose steps take three parts."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def unpack(self, data):
        return keras.utils.unpack_x_y_sample_weight(data)


class Triplets(Own):
    def train_step(self, data):
        anchor, positive, negative = data
        return {"value": value_of(anchor, positive, negative)}

    test_step = train_step


class Named(Own):
    def train_step(self, data):
        x, y, sample_weight = data
        return {"value": value_of(x, y, sample_weight)}

    test_step = train_step


class Unpacked(Own):
    def train_step(self, data):
        return {"value": value_of(*keras.utils.unpack_x_y_sample_weight(data))}

    test_step = train_step


class UnpackedByFunction(Own):
    def train_step(self, data):
        return {"value": value_of(*unpack(data))}

    test_step = train_step


class UnpackedByName(Own):
    def train_step(self, data):
        return {"value": value_of(*unpack_x_y_sample_weight(data))}

    test_step = train_step


class UnpackedByMethod(Own):
    def train_step(self, data):
        return {"value": value_of(*self.unpack(data))}

    test_step = train_step


class Inherited(Named):
    def train_step(self, data):
        return super().train_step(data)

    def test_step(self, data):
        return super().test_step(data)


class OtherTargets(Own):
    """Passes the third part on as weights, with other inputs and targets."""

    def train_step(self, data):
        x, y, w = data
        return {**super().train_step((2 * x, y + 1, w)), "value": value_of(x, y, w)}

    def test_step(self, data):
        x, y, w = data
        return {**super().test_step((2 * x, y + 1, w)), "value": value_of(x, y, w)}


class OtherWeights(Own):
    """Passes weights on that it computes from the third part."""

    def train_step(self, data):
        x, y, w = data
        return {**super().train_step((x, y, w**2)), "value": value_of(x, y, w)}

    def test_step(self, data):
        x, y, w = data
        return {**super().test_step((x, y, w**2)), "value": value_of(x, y, w)}


class Repacked(Own):
    """The default steps get the first two parts only."""

    def train_step(self, data):
        anchor, positive, negative = data
        return {**super().train_step((anchor, positive)), "value": value_of(anchor, positive, negative)}

    def test_step(self, data):
        anchor, positive, negative = data
        return {**super().test_step(((anchor, negative), positive)), "value": value_of(anchor, positive, negative)}

    def call(self, x):
        return super().call(x[0] if isinstance(x, tuple) else x)


class UnpackedPart(Own):
    """Unpacks a part of the batch."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data[:2])
        assert sample_weight is None
        return {"value": value_of(x, y, data[2])}

    test_step = train_step


TAKE_WEIGHTS = [Named, Unpacked, UnpackedByFunction, UnpackedByName, UnpackedByMethod, Inherited, OtherTargets]
TAKE_NONE = [Triplets, Repacked, UnpackedPart]


def made(cls, **options):
    model = cls()
    model.compile(**options)
    return model


def mean(weights, y=Y):
    """The mean of the values of the batches, each counted by the sum of its weights."""
    values = [X[cut].mean() + 2 * y[cut].mean() for cut in CUTS]
    return np.average(values, weights=[weights[cut].sum() for cut in CUTS])


each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
unused = pytest.mark.filterwarnings("ignore:.*does not use the sample weights")  # None of these steps does.


@each_source
@pytest.mark.parametrize("third", THIRDS.values(), ids=THIRDS)
@pytest.mark.parametrize("cls", TAKE_NONE)
def test_fit_and_evaluate_average_an_own_step_over_triplets_by_examples(source, third, cls):
    model, expected = made(cls, loss="mse"), mean(np.ones(10))
    history = model.fit(source(X, Y, third), validation_data=source(X, Y, third), verbose=0).history
    close(history["value"], [expected])
    close(history["val_value"], [expected])
    close(model.evaluate(source(X, Y, third), return_dict=True, verbose=0)["value"], expected)


@each_source
@unused
@pytest.mark.parametrize("cls", TAKE_WEIGHTS)
def test_fit_weighs_an_own_step_that_takes_sample_weights(source, cls):
    data = {"x": source(X, Y, WEIGHTS), "validation_data": source(X, Y, WEIGHTS)}
    history = made(cls, loss="mse").fit(**data, verbose=0).history
    close(history["value"], [mean(WEIGHTS)])
    close(history["val_value"], [mean(WEIGHTS)])


@each_source
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_fit_weighs_an_own_step_by_the_weights_that_it_gives_to_the_default_step(source, run_eagerly):
    model = made(OtherWeights, loss="mse", run_eagerly=run_eagerly)
    data = {"x": source(X, Y, -WEIGHTS), "validation_data": source(X, Y, -WEIGHTS)}
    history = model.fit(**data, verbose=0).history
    close(history["value"], [mean(WEIGHTS**2)])
    close(history["val_value"], [mean(WEIGHTS**2)])


@each_source
@unused
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("cls", TAKE_WEIGHTS)
def test_fit_refuses_negative_sample_weights_of_an_own_step_that_takes_them(source, cls, run_eagerly):
    with pytest.raises(ValueError, match="negative or not finite"):
        made(cls, loss="mse", run_eagerly=run_eagerly).fit(source(X, Y, -WEIGHTS), verbose=0)


@each_source
@unused
def test_fit_checks_the_labels_and_weights_of_each_batch_of_a_step_that_turns_out_to_take_them(source):
    model = made(UnpackedByFunction, loss="sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="y has the label 1"):
        model.fit(source(X, np.arange(10) // 9, WEIGHTS), verbose=0)
    with pytest.raises(ValueError, match="negative or not finite"):
        model.fit(source(X, np.zeros(10, "int32"), WEIGHTS - 10 * (WEIGHTS == 10) - 1), verbose=0)


@each_source
@unused
def test_fit_does_not_take_the_second_of_three_parts_for_labels(source):
    model = made(Triplets, loss="sparse_categorical_crossentropy")
    close(model.fit(source(X, -X, X), verbose=0).history["value"], [mean(np.ones(10), -X)])


def test_train_on_batch_and_test_on_batch_take_the_weights_that_are_given():
    model = made(Named)
    for step in (model.train_on_batch, model.test_on_batch):
        with pytest.raises(ValueError, match="negative or not finite"):
            step(X, Y, -WEIGHTS)


def test_evaluate_weighs_the_default_step():
    model = made(Own, loss="mse")
    found = model.evaluate(SOURCES["a generator"](X, Y, WEIGHTS), verbose=0)
    close(found, ((numpy(model(X)) - Y)[:, 0] ** 2 * WEIGHTS).mean())


@unused
@pytest.mark.parametrize("given", ["sample_weight", "class_weight"])
def test_fit_weighs_an_own_step_by_weights_that_are_given(given):
    labels = np.arange(10) % 2
    weights = np.where(labels, 3.0, 1.0)
    options = {"class_weight": {0: 1.0, 1: 3.0}} if given == "class_weight" else {"sample_weight": weights}
    history = made(Triplets).fit(X, labels, batch_size=4, shuffle=False, verbose=0, **options).history
    close(history["value"], [mean(weights, labels)])
