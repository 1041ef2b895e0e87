"""Data as `Model.fit`, `evaluate` and `predict` take it."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import DataError
from tests.numbered import Numbered

X = np.arange(10, dtype="float32")[:, None]
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
WEIGHT = np.linspace(0.5, 5.0, 10).astype("float32")


class Mean(hl.Model):
    """Reports the mean of each batch, weighted where there are weights."""

    def train_step(self, data):
        x, _, weight = keras.utils.unpack_x_y_sample_weight(data)
        if weight is None:
            return {"x": ops.mean(x)}
        weight = ops.reshape(ops.cast(weight, "float32"), (len(x), -1))[:, 0]
        return {"x": ops.sum(x[:, 0] * weight) / ops.sum(weight)}

    test_step = train_step


def given(*data, **options):
    """The batches that a model's steps were given by `fit`, in training and in validation."""
    training, validation = [], []

    class Echo(hl.Model):
        def train_step(self, data):
            training.append(as_numpy(data))
            return {}

        def test_step(self, data):
            validation.append(as_numpy(data))
            return {}

    with hl.run_eagerly(True):
        Echo().fit(*data, **{"verbose": 0, "shuffle": False} | options)
    return training, validation


def as_numpy(data):
    return keras.tree.map_structure(lambda part: None if part is None else ops.convert_to_numpy(part), data)


def assert_equal(batch, expected):
    keras.tree.assert_same_structure(batch, expected)
    keras.tree.map_structure(np.testing.assert_array_equal, batch, expected)


def regressor():
    inputs = keras.Input((1,))
    model = hl.Model(inputs, layers.Dense(1, kernel_initializer="ones")(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", weighted_metrics=["mae"])
    return model


# --------------------------------------------------------------------------- parts


def test_x_alone_is_given_as_x():
    [batch], _ = given(X)
    assert_equal(batch, X)


def test_x_y_and_weights_are_given_together():
    [batch], _ = given(X, Y, sample_weight=WEIGHT)
    assert_equal(batch, (X, Y, WEIGHT))


def test_x_and_weights_are_given_without_y():
    [batch], _ = given(X, sample_weight=WEIGHT)
    assert_equal(batch, (X, None, WEIGHT))


def test_pandas_and_tensors_are_arrays():
    [batch], _ = given(pd.DataFrame({"x": X[:, 0]}), pd.Series(Y), sample_weight=ops.convert_to_tensor(WEIGHT))
    assert_equal(batch, (X, Y, WEIGHT))


def test_arrays_come_in_batches_of_the_size_asked_for():
    assert [len(batch) for batch in given(X, batch_size=4)[0]] == [4, 4, 2]


def test_inputs_may_be_a_dict():
    inputs = {"a": keras.Input((1,), name="a"), "b": keras.Input((1,), name="b")}
    model = hl.Model(inputs, layers.Subtract()([inputs["a"], inputs["b"]]))
    model.compile(loss="mse")
    data = {"b": X, "a": 3 * X}
    assert model.evaluate(data, 2 * X, verbose=0) == 0
    np.testing.assert_array_equal(model.predict(data, batch_size=3, verbose=0), 2 * X)


def test_x_alone_trains_a_model_with_a_step_of_its_own():
    class Autoencoder(hl.Model):
        def train_step(self, x):
            return {"loss": self.minimize(lambda: ops.mean((self(x) - x) ** 2))}

    model = Autoencoder([layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01))
    history = model.fit(X, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.parametrize("batch", [(X, Y, WEIGHT), (X, Y), (X,), X, {"a": X}], ids=["x y w", "x y", "(x)", "x", "dict"])
def test_batches_of_a_source_are_given_as_they_come(batch):
    assert_equal(given(iter([batch, batch]))[0], [batch, batch])


def test_a_feed_is_taken_as_it_is():
    feed = hl.Feed((X, Y), batch_size=4)
    model = Mean()
    np.testing.assert_allclose(model.fit(feed, verbose=0).history["x"], [4.5], rtol=1e-6)
    np.testing.assert_allclose(model.evaluate(feed, return_dict=True, verbose=0)["x"], 4.5, rtol=1e-6)


def test_arrays_are_shuffled_unless_told_otherwise():
    orders = [np.ravel(epoch).tolist() for _ in range(2) for epoch in given(X, shuffle=True, epochs=2)[0]]
    assert [sorted(order) for order in orders] == [X[:, 0].tolist()] * 4
    assert len(set(map(tuple, orders))) == 4  # Each epoch has an order of its own, and each fit.


def test_the_order_is_that_of_keras_s_random_seed():
    orders = []
    for _ in range(2):
        keras.utils.set_random_seed(4)
        orders.append(np.ravel(given(X, shuffle=True)[0]).tolist())
    assert orders[0] == orders[1] != X[:, 0].tolist()


def test_a_pydataset_is_shuffled_by_batch():
    keras.utils.set_random_seed(1)
    epochs, _ = given(Numbered(), shuffle=True, epochs=8)
    firsts = [tuple(x[0] for x, _ in epochs[first : first + 3]) for first in range(0, 24, 3)]
    assert {tuple(sorted(epoch)) for epoch in firsts} == {(0, 4, 8)}
    assert len(set(firsts)) > 1


def test_validation_keeps_the_order():
    _, batches = given(X, Y, validation_data=(X, Y), batch_size=4, shuffle=True)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), X)


def test_predictions_keep_the_order():
    np.testing.assert_array_equal(regressor().predict(X, batch_size=4, verbose=0), X)


@pytest.mark.parametrize("extra", [{"y": Y}, {"sample_weight": WEIGHT}])
@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (lambda: iter([(X, Y)]), "list_iterator"),
        (lambda: (batch for batch in [(X, Y)]), "generator"),
        (Numbered, "Numbered"),
        (lambda: hl.Feed((X, Y)), "Feed"),
    ],
    ids=["iterator", "generator", "PyDataset", "Feed"],
)
def test_a_source_of_batches_takes_nothing_beside_it(source, kind, extra):
    with pytest.raises(DataError, match=rf"x gives batches by itself \(it is of type {kind}\).*each batch as \(x, y\)"):
        regressor().fit(source(), **extra, verbose=0)


@pytest.mark.parametrize(
    ("extra", "name"), [({"y": Y.tolist()}, "y"), ({"y": Y, "sample_weight": WEIGHT.tolist()}, "sample_weight")]
)
def test_a_list_of_numbers_beside_arrays_is_named(extra, name):
    with pytest.raises(DataError, match=rf"{name} must be too; it is of type list.*by np.array\(\.\.\.\)"):
        regressor().fit(X, **extra, verbose=0)


def test_a_list_of_numbers_as_x_is_told_what_x_can_be():
    with pytest.raises(DataError, match=r"No batches can be made of data of type list.*by np.array\(\.\.\.\)"):
        regressor().fit([[1.0], [2.0]], Y[:2], verbose=0)


def test_lengths_that_differ_are_named():
    with pytest.raises(DataError, match="x has 10, y has 9"):
        regressor().fit(X, Y[:9], verbose=0)
    with pytest.raises(DataError, match="x has 10, y has 10, sample_weight has 3"):
        regressor().evaluate(X, Y, sample_weight=WEIGHT[:3], verbose=0)


def test_no_data_at_all_is_an_error():
    with pytest.raises(DataError, match="No batches can be made of data of type NoneType"):
        regressor().fit(verbose=0)
    with pytest.raises(DataError, match="The data is empty"):
        regressor().predict(X[:0], verbose=0)


def test_weights_without_y_weigh_one_batch_and_averages():
    inputs = keras.Input((1,))
    model = Mean(inputs, inputs)
    expected = np.average(X[:, 0], weights=WEIGHT)
    assert model.train_on_batch(X, sample_weight=WEIGHT) == pytest.approx(expected)
    history = model.fit(X, sample_weight=WEIGHT, batch_size=4, verbose=0).history
    np.testing.assert_allclose(history["x"], [expected], rtol=1e-6)


# --------------------------------------------------------------------------- weights by class


@pytest.mark.parametrize(
    "labels",
    [Y, Y[:, None], Y.astype("float32"), np.eye(3)[Y], np.eye(3, dtype="int32")[Y], pd.Series(Y)],
    ids=["labels", "column", "floats", "one-hot", "one-hot integers", "Series"],
)
def test_class_weights_weigh_each_example_by_its_class(labels):
    [(_, _, weight)], _ = given(X, labels, class_weight={0: 0.5, 2: 4.0})
    np.testing.assert_array_equal(weight, np.array([0.5, 1.0, 4.0])[Y])


def test_class_weights_have_the_usual_float_as_their_dtype():
    [(_, _, weight)], _ = given(X, Y, class_weight={0: 0.1})
    assert weight.dtype == "float32"


def test_class_weights_are_applied_to_each_batch_of_a_source():
    batches, _ = given(iter([(X, Y), (X[:3], Y[:3])]), class_weight={1: 3.0})
    for batch, labels in zip(batches, (Y, Y[:3]), strict=True):
        np.testing.assert_array_equal(batch[2], np.where(labels == 1, 3.0, 1.0))


def test_class_weights_train_as_the_same_sample_weights_do():
    def trained(**weighting):
        keras.utils.set_random_seed(2)
        model = hl.Model([layers.Dense(3)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(X / 10, Y, batch_size=5, verbose=0, **weighting)
        return np.concatenate([np.ravel(weight) for weight in model.get_weights()])

    by_class = trained(class_weight={0: 0.1, 1: 1.0, 2: 10.0})
    np.testing.assert_allclose(by_class, trained(sample_weight=np.array([0.1, 1.0, 10.0])[Y]), rtol=1e-6)
    assert not np.allclose(by_class, trained())


def test_class_weights_weigh_an_own_step_as_by_hand(eagerly):
    class Own(hl.Model):
        def train_step(self, data):
            x, y, weight = data
            error = ops.abs(self(x)[:, 0] - ops.cast(y, "float32"))
            return {"mae": ops.sum(error * weight) / ops.sum(weight)}

    inputs = keras.Input((1,))
    model = Own(inputs, layers.Dense(1, kernel_initializer="ones")(inputs))
    history = model.fit(X, Y, batch_size=4, class_weight={0: 2.0, 1: 0.0}, verbose=0).history
    expected = np.average(np.abs(X[:, 0] - Y), weights=np.array([2.0, 0.0, 1.0])[Y])
    np.testing.assert_allclose(history["mae"], [expected], rtol=1e-6)


def test_class_weights_leave_validation_alone():
    [training], [validation] = given(X, Y, class_weight={0: 9.0}, validation_data=(X, Y))
    assert (len(training), len(validation)) == (3, 2)


def test_class_weights_of_one_batch():
    model = regressor()
    by_class = model.train_on_batch(X, Y, class_weight={0: 2.0, 1: 0.0}, return_dict=True)
    by_hand = model.train_on_batch(X, Y, sample_weight=np.array([2.0, 0.0, 1.0])[Y], return_dict=True)
    assert by_class == by_hand


def test_class_weight_and_sample_weight_together_are_refused():
    for data in ((X, Y), (iter([(X, Y, WEIGHT)]),)):
        weight = {} if len(data) == 1 else {"sample_weight": WEIGHT}
        with pytest.raises(DataError, match=r"class_weight or sample_weight, not both; multiply them into one"):
            regressor().fit(*data, class_weight={0: 2.0}, verbose=0, **weight)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((X,), "class_weight needs the labels of one output as y"),
        ((X, {"a": Y, "b": Y}), "class_weight needs the labels of one output.*for several outputs, pass sample_weight"),
        ((iter([X]),), r"class_weight needs labels: batches of the form \(x, y\)"),
        ((hl.Feed((X, Y)),), r"class_weight is not applied to an hl.Feed"),
    ],
    ids=["no labels", "several outputs", "source without labels", "feed"],
)
def test_class_weights_without_labels_of_one_output_are_refused(data, match):
    with pytest.raises(DataError, match=match):
        given(*data, class_weight={0: 2.0})


# --------------------------------------------------------------------------- validation


def test_validation_split_takes_the_end_of_the_arrays_unshuffled():
    [training], [validation] = given(X, Y, sample_weight=WEIGHT, validation_split=0.3, shuffle=True)
    assert sorted(training[0][:, 0]) == list(range(7))
    assert_equal(validation, (X[7:], Y[7:], WEIGHT[7:]))


def test_validation_split_cuts_frames_tensors_and_nested_inputs():
    data = {"frame": pd.DataFrame({"x": X[:, 0]}, index=range(20, 30)), "tensor": ops.convert_to_tensor(X)}
    [training], [validation] = given(data, pd.Series(Y, index=range(10, 0, -1)), validation_split=0.5)
    assert_equal(training, ({"frame": X[:5], "tensor": X[:5]}, Y[:5]))
    assert_equal(validation, ({"frame": X[5:], "tensor": X[5:]}, Y[5:]))


def test_validation_batches_have_their_own_size_or_that_of_training():
    for options, sizes in (({}, [4, 4, 2]), ({"validation_batch_size": 5}, [5, 5])):
        _, validation = given(X, validation_data=(X,), batch_size=4, **options)
        assert [len(batch) for batch in validation] == sizes


def test_validation_data_goes_before_validation_split():
    [training], [validation] = given(X, validation_split=0.5, validation_data=(10 * X,))
    assert_equal((training, validation), (X, 10 * X))


def test_validation_data_may_be_a_source_of_batches():
    history = Mean().fit(X, validation_data=lambda: iter([X[:3], X[3:]]), epochs=2, verbose=0).history
    np.testing.assert_allclose(history["val_x"], [4.5, 4.5], rtol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 1.5, -0.5])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(DataError, match="validation_split is a fraction between 0 and 1; received"):
        regressor().fit(X, Y, validation_split=fraction, verbose=0)


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match=r"validation_split=0\.05 leaves no examples on one side of 1"):
        regressor().fit(X[:1], Y[:1], validation_split=0.05, verbose=0)


def test_a_source_of_batches_cannot_be_split():
    with pytest.raises(DataError, match=r"validation_split is for arrays; .* as validation_data"):
        regressor().fit(iter([(X, Y)]), validation_split=0.5, verbose=0)


# --------------------------------------------------------------------------- what averages are weighted by


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT[:, None]], ids=["vector", "column"])
def test_sample_weights_weigh_the_averages_of_uneven_batches(eagerly, weight):
    history = Mean().fit(X, Y, batch_size=4, sample_weight=weight, verbose=0).history
    np.testing.assert_allclose(history["x"], [np.average(X[:, 0], weights=WEIGHT)], rtol=1e-6)


def test_weights_of_steps_in_time_weigh_the_averages():
    weight = np.stack([WEIGHT, 2 * WEIGHT], axis=1)

    class PerStep(hl.Model):
        def train_step(self, data):
            _, y, weight = data
            return {"y": ops.sum(y[..., 0] * weight) / ops.sum(weight)}

    y = np.stack([X, X + 1], axis=1)  # (examples, steps, 1)
    history = PerStep().fit(X, y, batch_size=4, sample_weight=weight, verbose=0).history
    np.testing.assert_allclose(history["y"], [np.average(y[..., 0], weights=weight)], rtol=1e-6)


@pytest.mark.parametrize(
    "third", [X + np.zeros((1, 3), "float32"), {"a": WEIGHT}], ids=["triplets", "weights of several outputs"]
)
def test_a_third_part_that_is_no_weight_of_examples_leaves_averages_by_examples(third):
    class First(hl.Model):
        def train_step(self, data):
            return {"x": ops.mean(data[0])}

    data = iter([(X[:4], Y[:4], cut(third, slice(0, 4))), (X[4:], Y[4:], cut(third, slice(4, None)))])
    np.testing.assert_allclose(First().fit(data, verbose=0).history["x"], [4.5], rtol=1e-6)


def cut(part, where):
    return keras.tree.map_structure(lambda array: array[where], part)


def test_weighted_metrics_heed_sample_weights():
    values = regressor().evaluate(X, 3 * X, batch_size=4, sample_weight=WEIGHT, return_dict=True, verbose=0)
    np.testing.assert_allclose(values["mae"], np.average(2 * X[:, 0], weights=WEIGHT), rtol=1e-6)
