"""The data that `Model.fit`, `evaluate` and `predict` take, and the weights of examples."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import DataError
from tests.models import compiled, fit, functional
from tests.numbered import Numbered
from tests.numbers import close, numpy, same

X = np.arange(10, dtype="float32")[:, None]
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
WEIGHT = np.linspace(0.5, 5.0, 10).astype("float32")


class Mean(hl.Model):
    """Reports the mean of each batch, weighted if there are weights."""

    def train_step(self, data):
        x, _, weight = keras.utils.unpack_x_y_sample_weight(data)
        if weight is None:
            return {"x": ops.mean(x)}
        weight = ops.reshape(ops.cast(weight, "float32"), (len(x), -1))[:, 0]
        return {"x": ops.sum(x[:, 0] * weight) / ops.sum(weight)}

    test_step = train_step


def given(*data, **options):
    """The batches that `fit` gives the steps of a model, in training and in validation."""
    training, validation = [], []

    class Echo(hl.Model):
        def train_step(self, data):
            training.append(as_numpy(data))
            return {}

        def test_step(self, data):
            validation.append(as_numpy(data))
            return {}

    with hl.run_eagerly(True):
        fit(Echo(), *data, **options)
    return training, validation


def as_numpy(data):
    return keras.tree.map_structure(lambda part: None if part is None else numpy(part), data)


def assert_equal(batch, expected):
    keras.tree.assert_same_structure(batch, expected)
    keras.tree.map_structure(np.testing.assert_array_equal, batch, expected)


def regressor():
    dense = layers.Dense(1, kernel_initializer="ones")
    return compiled(functional(dense, inputs=1), keras.optimizers.SGD(0.0), weighted_metrics=["mae"])


# ------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("data", "weight", "expected"),
    [
        ((X,), None, X),
        ((X, Y), None, (X, Y)),
        ((X, Y), WEIGHT, (X, Y, WEIGHT)),
        ((X,), WEIGHT, (X, None, WEIGHT)),
        (({"a": X, "b": 2 * X},), None, {"a": X, "b": 2 * X}),
        (([X, 2 * X],), None, ([X, 2 * X],)),
        (([X, 2 * X], Y), None, ([X, 2 * X], Y)),
        ((pd.DataFrame({"x": X[:, 0]}), pd.Series(Y)), pd.Series(WEIGHT), (X, Y, WEIGHT)),
    ],
    ids=["x", "x y", "x y w", "x w", "dict", "list", "list y", "pandas"],
)
def test_fit_gives_a_step_the_parts_that_it_was_given(data, weight, expected):
    [batch], _ = given(*data, sample_weight=weight)
    assert_equal(batch, expected)


def test_evaluate_and_predict_take_inputs_by_name():
    inputs = {"a": keras.Input((1,), name="a"), "b": keras.Input((1,), name="b")}
    model = compiled(hl.Model(inputs, layers.Subtract()([inputs["a"], inputs["b"]])))
    data = {"b": X, "a": 3 * X}
    assert model.evaluate(data, 2 * X, verbose=0) == 0
    same(model.predict(data, batch_size=3, verbose=0), 2 * X)


@pytest.mark.parametrize("batch", [(X, Y, WEIGHT), (X, Y), (X,), X, {"a": X}], ids=["x y w", "x y", "(x)", "x", "dict"])
def test_fit_gives_a_step_the_batches_of_a_source_unchanged(batch):
    assert_equal(given(iter([batch, batch]))[0], [batch, batch])


def test_fit_and_evaluate_take_a_feed():
    feed = hl.Feed((X, Y), batch_size=4)
    close(fit(Mean(), feed)["x"], [4.5])
    close(Mean().evaluate(feed, return_dict=True, verbose=0)["x"], 4.5)


def test_fit_shuffles_arrays_in_each_epoch_by_the_seed_of_keras():
    def orders():
        keras.utils.set_random_seed(4)
        return [np.ravel(epoch).tolist() for epoch in given(X, shuffle=True, epochs=2)[0]]

    first, second = orders()
    assert sorted(first) == sorted(second) == X[:, 0].tolist()
    assert len(set(map(tuple, [first, second, X[:, 0]]))) == 3
    assert orders() == [first, second]


def test_fit_shuffles_a_pydataset_by_batch():
    keras.utils.set_random_seed(1)
    epochs, _ = given(Numbered(), shuffle=True, epochs=8)
    firsts = [tuple(x[0] for x, _ in epochs[first : first + 3]) for first in range(0, 24, 3)]
    assert {tuple(sorted(epoch)) for epoch in firsts} == {(0, 4, 8)}
    assert len(set(firsts)) > 1


def test_validation_and_predict_keep_the_order():
    _, batches = given(X, Y, validation_data=(X, Y), batch_size=4, shuffle=True)
    same(np.concatenate([x for x, _ in batches]), X)
    same(regressor().predict(X, batch_size=4, verbose=0), X)


SOURCES = {
    "list_iterator": lambda: iter([(X, Y)]),
    "generator": lambda: (batch for batch in [(X, Y)]),
    "Numbered": Numbered,
    "Feed": lambda: hl.Feed((X, Y)),
}


@pytest.mark.parametrize("extra", [{"y": Y}, {"sample_weight": WEIGHT}])
@pytest.mark.parametrize("kind", SOURCES)
def test_fit_refuses_y_or_weights_beside_a_source_of_batches(kind, extra):
    with pytest.raises(DataError, match=rf"x gives batches by itself \(its type is {kind}\).*as \(x, y\).*HL434"):
        fit(regressor(), SOURCES[kind](), **extra)


@pytest.mark.parametrize(
    ("extra", "name"), [({"y": Y.tolist()}, "y"), ({"y": Y, "sample_weight": WEIGHT.tolist()}, "sample_weight")]
)
def test_fit_refuses_a_list_of_numbers_beside_arrays(extra, name):
    with pytest.raises(DataError, match=rf"{name} must be arrays too; its type is list.*np.array\({name}\).*HL435"):
        fit(regressor(), X, **extra)


# ---------------------------------------------------------------- class weights


@pytest.mark.parametrize(
    "labels",
    [Y, Y[:, None], Y.astype("float32"), np.eye(3)[Y], np.eye(3, dtype="int32")[Y], pd.Series(Y)],
    ids=["labels", "column", "floats", "one-hot", "one-hot integers", "Series"],
)
def test_class_weight_weighs_each_example_by_its_class(labels):
    [(_, _, weight)], _ = given(X, labels, class_weight={0: 0.5, 2: 4.0})
    assert weight.dtype == "float32"
    same(weight, np.array([0.5, 1.0, 4.0])[Y])


def test_class_weight_weighs_the_batches_of_a_source():
    batches, _ = given(iter([(X, Y), (X[:3], Y[:3])]), class_weight={1: 3.0})
    for batch, labels in zip(batches, (Y, Y[:3]), strict=True):
        same(batch[2], np.where(labels == 1, 3.0, 1.0))


def test_class_weight_does_not_weigh_validation():
    [training], [validation] = given(X, Y, class_weight={0: 9.0}, validation_data=(X, Y))
    assert (len(training), len(validation)) == (3, 2)


def test_train_on_batch_takes_class_weight():
    model = regressor()
    by_class = model.train_on_batch(X, Y, class_weight={0: 2.0, 1: 0.0}, return_dict=True)
    by_hand = model.train_on_batch(X, Y, sample_weight=np.array([2.0, 0.0, 1.0])[Y], return_dict=True)
    assert by_class == by_hand


@pytest.mark.parametrize(
    ("data", "weight", "match"),
    [
        ((X, Y), WEIGHT, "Both class_weight and sample_weight.*HL439"),
        ((iter([(X, Y, WEIGHT)]),), None, "Both class_weight and sample_weight.*HL439"),
        ((X,), None, "class_weight.*labels of one output.*HL402"),
        ((X, {"a": Y, "b": Y}), None, "class_weight.*labels of one output.*each by its name.*HL402"),
        ((iter([X]),), None, r"class_weight needs labels.*\(x, y\).*HL440"),
        ((hl.Feed((X, Y)),), None, "class_weight does not apply to an hl.Feed.*HL433"),
    ],
    ids=["two weights", "two in a source", "no labels", "several outputs", "source without labels", "feed"],
)
def test_class_weight_is_refused_without_labels_of_one_output_or_beside_other_weights(data, weight, match):
    with pytest.raises(DataError, match=match):
        given(*data, sample_weight=weight, class_weight={0: 2.0})


# ------------------------------------------------------------------- validation


def test_validation_split_takes_the_end_of_the_arrays_unshuffled():
    [training], [validation] = given(X, Y, sample_weight=WEIGHT, validation_split=0.3, shuffle=True)
    assert sorted(training[0][:, 0]) == list(range(7))
    assert_equal(validation, (X[7:], Y[7:], WEIGHT[7:]))


def test_validation_split_cuts_frames_tensors_and_nested_inputs():
    data = {"frame": pd.DataFrame({"x": X[:, 0]}, index=range(20, 30)), "tensor": ops.convert_to_tensor(X)}
    [training], [validation] = given(data, pd.Series(Y, index=range(10, 0, -1)), validation_split=0.5)
    assert_equal(training, ({"frame": X[:5], "tensor": X[:5]}, Y[:5]))
    assert_equal(validation, ({"frame": X[5:], "tensor": X[5:]}, Y[5:]))


@pytest.mark.parametrize(("options", "sizes"), [({}, [4, 4, 2]), ({"validation_batch_size": 5}, [5, 5])])
def test_validation_has_its_own_batch_size_or_that_of_training(options, sizes):
    _, validation = given(X, validation_data=(X,), batch_size=4, **options)
    assert [len(batch) for batch in validation] == sizes


def test_validation_data_has_priority_over_validation_split():
    [training], [validation] = given(X, validation_split=0.5, validation_data=(10 * X,))
    assert_equal((training, validation), (X, 10 * X))


def test_validation_data_may_be_a_source_of_batches():
    close(fit(Mean(), X, validation_data=lambda: iter([X[:3], X[3:]]), epochs=2)["val_x"], [4.5, 4.5])


@pytest.mark.parametrize(
    ("data", "fraction", "match"),
    [
        ((X, Y), 1.0, r"between 0 and 1; received 1\.0.*HL437"),
        ((X, Y), -0.5, r"between 0 and 1; received -0\.5.*HL437"),
        ((X[:1], Y[:1]), 0.05, r"validation_split=0\.05 of 1 example.* leaves an empty part.*HL438"),
        ((iter([(X, Y)]),), 0.5, "source of batches.*validation_data.*HL436"),
    ],
)
def test_validation_split_is_refused_where_it_cannot_split(data, fraction, match):
    with pytest.raises(DataError, match=match):
        fit(regressor(), *data, validation_split=fraction)


# --------------------------------------------------------------- sample weights


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT[:, None]], ids=["vector", "column"])
@pytest.mark.parametrize("y", [Y, None], ids=["y", "no y"])
def test_sample_weight_weighs_the_averages_of_uneven_batches(weight, y, eagerly):
    expected = np.average(X[:, 0], weights=WEIGHT)
    close(fit(Mean(), X, y, batch_size=4, sample_weight=weight)["x"], [expected])
    close(Mean().train_on_batch(X, y, sample_weight=weight, return_dict=True)["x"], expected)


def test_sample_weight_of_steps_in_time_weighs_the_averages():
    class PerStep(hl.Model):
        def train_step(self, data):
            _, y, weight = data
            return {"y": ops.sum(y[..., 0] * weight) / ops.sum(weight)}

    weight = np.stack([WEIGHT, 2 * WEIGHT], axis=1)
    y = np.stack([X, X + 1], axis=1)  # (examples, steps, 1)
    close(fit(PerStep(), X, y, batch_size=4, sample_weight=weight)["y"], [np.average(y[..., 0], weights=weight)])


@pytest.mark.parametrize(
    "third", [X - np.full((1, 3), 9, "float32"), {"a": WEIGHT}], ids=["triplets", "weights of several outputs"]
)
def test_fit_averages_by_examples_where_the_third_part_is_not_a_weight_per_example(third):
    class First(hl.Model):
        def train_step(self, data):
            return {"x": ops.mean(data[0])}

    batches = (
        keras.tree.map_structure(lambda array, chosen=chosen: array[chosen], (X, Y, third))
        for chosen in (slice(4), slice(4, None))
    )
    close(fit(First(), batches)["x"], [4.5])
