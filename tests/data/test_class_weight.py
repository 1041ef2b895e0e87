"""Labels outside the classes are an error before the model is trained on them; all other labels are accepted."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers, losses, ops

import handloom as hl
from handloom.errors import DataError
from tests.models import compiled, fit, functional, subclassed
from tests.numbers import close, numpy, same

X = np.linspace(-1, 1, 12, dtype="float32").reshape(6, 2)
GOOD, BAD = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 0, 3, 3])
REFUSED = r"y has the label 3 \(at \[4\], one of 2 outside the classes\), .* 3 outputs, for classes 0 to 2\..*HL403"
ONE_HOT = np.eye(3, dtype="float32")[GOOD]

MODELS = {
    "functional": lambda: functional(layers.Dense(3), inputs=2),
    "sequential, not built": lambda: hl.Sequential([layers.Dense(3)]),
    "subclassed, not built": lambda: subclassed(layers.Dense(3), inputs=None),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def classifier(make=MODELS["functional"], loss=None):
    return compiled(make(), "sgd", loss or losses.SparseCategoricalCrossentropy(from_logits=True))


def trains(model, *data):
    return np.isfinite(fit(model, *data)["loss"]).all()


@every_model
@pytest.mark.parametrize("loss", [None, "sparse_categorical_crossentropy", losses.sparse_categorical_crossentropy])
def test_fit_refuses_a_label_outside_the_classes_with_the_fix(make, loss):
    model = classifier(make, loss)
    with pytest.raises(DataError, match=r"(?=.*Number the classes from 0, or give the last layer as many)" + REFUSED):
        fit(model, X, BAD)
    assert model.optimizer.iterations == 0
    assert trains(model, X, GOOD)


@pytest.mark.parametrize(
    ("labels", "label", "place"),
    [
        (np.array([0, 1, -1, 0, 1, 2]), "-1", r"\[2\]"),
        (BAD[:, None], "3", r"\[4, 0\]"),
        (BAD.astype("float32"), "3.0", r"\[4\]"),
        (BAD.astype("uint8"), "3", r"\[4\]"),
        (pd.Series(BAD, index=range(10, 16)), "3", r"\[4\]"),
        (pd.DataFrame({"label": BAD}), "3", r"\[4, 0\]"),
        (ops.convert_to_tensor(BAD), "3", r"\[4\]"),
    ],
    ids=["negative", "column", "floats", "uint8", "Series", "DataFrame", "tensor"],
)
def test_fit_checks_labels_of_any_form(labels, label, place):
    with pytest.raises(DataError, match=rf"the label {label} \(at {place}"):
        fit(classifier(), X, labels)


def test_fit_names_the_place_of_the_label_of_a_pixel():
    inputs = keras.Input((4, 4, 1))
    labels = np.zeros((2, 4, 4), "int32")
    labels[1, 2, 3] = 7
    with pytest.raises(DataError, match=r"the label 7 \(at \[1, 2, 3\], one of 1 outside"):
        fit(classifier(lambda: hl.Model(inputs, layers.Conv2D(3, 1)(inputs))), np.zeros((2, 4, 4, 1)), labels)


@every_model
def test_fit_trains_the_same_with_and_without_the_check_of_labels(make):
    def trained(loss):
        keras.utils.set_random_seed(1)
        return fit(classifier(make, loss), X, GOOD, batch_size=2, epochs=2)["loss"]

    def unchecked(y_true, y_pred):
        return losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    close(trained(None), trained(unchecked), rtol=1e-6)


@pytest.mark.parametrize("method", ["train_on_batch", "test_on_batch"])
def test_train_and_test_on_batch_check_labels(method):
    with pytest.raises(DataError, match=REFUSED):
        getattr(classifier(), method)(X, BAD)


def test_fit_checks_the_labels_of_validation_before_training():
    model = classifier()
    with pytest.raises(DataError, match=REFUSED):
        fit(model, X, GOOD, validation_data=(X, BAD))
    assert model.optimizer.iterations == 0


def test_fit_checks_the_labels_of_a_source_batch_by_batch():
    seen = []

    def batches():
        for labels in (GOOD, GOOD, BAD):
            seen.append(labels)
            yield X, labels

    with pytest.raises(DataError, match=REFUSED):
        fit(classifier(), batches())
    assert len(seen) == 3


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return X, BAD, np.ones(6, "float32")


FEEDS = {
    "feed of arrays": lambda: hl.Feed((X, BAD), batch_size=2),
    "feed of batches": lambda: hl.Feed(lambda: iter([(X, BAD)])),
}
SOURCES = FEEDS | {"function": lambda: lambda: iter([(X, BAD)]), "PyDataset": Data, "list": lambda: iter([[X, BAD]])}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_fit_and_evaluate_check_the_labels_of_every_kind_of_source(source, method):
    with pytest.raises(DataError, match=REFUSED):
        getattr(classifier(), method)(SOURCES[source](), verbose=0)


@pytest.mark.parametrize("feed", FEEDS)
def test_feed_is_free_of_the_checks_of_a_model_elsewhere(feed):
    given = FEEDS[feed]()
    with pytest.raises(DataError, match=REFUSED):
        fit(classifier(), given)
    assert trains(classifier(lambda: functional(layers.Dense(9), inputs=2)), given)
    same(np.concatenate([numpy(y) for _, y in given]), BAD)


def with_output_spec(compute):
    """A subclassed model, not built, that computes its output's shape by this function of the model and its inputs."""
    return lambda: subclassed(
        layers.Dense(3), inputs=None, cls=type("Model", (hl.Model,), {"compute_output_spec": compute})
    )


def test_fit_counts_the_classes_of_a_model_once():
    calls = []

    def counted(model, *args, **kwargs):
        calls.append(model)
        return hl.Model.compute_output_spec(model, *args, **kwargs)

    fit(classifier(with_output_spec(counted)), iter([(X, GOOD)] * 20))
    assert len(calls) == 1


def test_fit_accepts_the_ignored_class():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    assert trains(classifier(loss=loss), X, np.array([0, 1, -1, 0, 1, -1]))
    with pytest.raises(DataError, match=r"the label 5 \(at \[0\], one of 1 outside"):
        fit(classifier(loss=loss), X, np.array([5, 1, -1, 0, 1, -1]))


# --------------------------------------------------------------------------- no false alarms


def unknown_spec(model, x):
    raise NotImplementedError


@pytest.mark.parametrize("spec", [unknown_spec, lambda model, x: keras.KerasTensor((None, None), "float32")])
def test_fit_trains_a_model_whose_number_of_classes_is_unknown(spec):
    assert trains(classifier(with_output_spec(spec)), X, GOOD)


@pytest.mark.parametrize(
    ("loss", "labels", "units"),
    [
        ("mse", BAD.astype("float32")[:, None] * 100, 1),
        ("binary_crossentropy", np.array([0, 1, 0, 1, 1, 0])[:, None], 1),
        ("categorical_crossentropy", ONE_HOT, 3),
        ("categorical_focal_crossentropy", ONE_HOT, 3),
        ("hinge", np.array([-1, 1, -1, 1, 1, -1])[:, None], 1),
    ],
)
def test_fit_accepts_any_labels_with_other_losses(loss, labels, units):
    assert trains(classifier(lambda: functional(layers.Dense(units), inputs=2), loss), X, labels)


def test_fit_leaves_labels_of_several_outputs_to_their_losses():
    inputs = keras.Input((2,))
    model = hl.Model(inputs, {"a": layers.Dense(3)(inputs), "b": layers.Dense(1)(inputs)})
    loss = {"a": losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    assert trains(compiled(model, loss=loss), X, {"a": GOOD, "b": np.full((6, 1), 50.0, "float32")})


def test_fit_accepts_any_label_without_a_compiled_loss():
    class Own(hl.Model):
        def train_step(self, data):
            return {"y": ops.mean(ops.cast(data[1], "float32"))}

    assert fit(functional(inputs=2, cls=Own), X, 100 * GOOD)["y"] == [100.0]


def test_predict_checks_no_labels():
    model = classifier()
    same(model.predict(iter([(X, BAD)]), verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize("label", [0, 2])
def test_evaluate_accepts_the_first_and_the_last_class(label):
    assert np.isfinite(classifier().evaluate(X, np.full(6, label), verbose=0))


# --------------------------------------------------------------------------- class weights of several outputs

SECOND = np.array([1, 1, 0, 1, 0, 0])
BY_OUTPUT = {"a": {0: 3.0, 2: 0.5}, "b": {1: 2.0}}
WEIGHTS = {"a": np.array([3, 1, 0.5, 3, 1, 0.5], "float32"), "b": np.array([2, 2, 1, 2, 1, 1], "float32")}
FORMS = {"dict": lambda a, b: {"a": a, "b": b}, "list": lambda a, b: [a, b]}
SOURCE = {"arrays": lambda x, y: (x, y), "source": lambda x, y: (iter([(x, y)]),)}
every_form = pytest.mark.parametrize(("form", "outputs"), [("dict", "dict"), ("dict", "list"), ("list", "list")])
from_all = pytest.mark.parametrize("source", SOURCE)


def with_two_outputs(outputs="list", cls=hl.Model):
    inputs = keras.Input((2,))
    a = layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(seed=1), name="a")(inputs)
    b = layers.Dense(2, kernel_initializer=keras.initializers.RandomNormal(seed=2), name="b")(inputs)
    crossentropy = losses.SparseCategoricalCrossentropy(from_logits=True)
    return compiled(cls(inputs, FORMS[outputs](a, b)), loss={"a": crossentropy, "b": crossentropy})


@from_all
@every_form
def test_fit_takes_the_class_weight_of_each_output_by_its_name(form, outputs, source):
    model, other = with_two_outputs(outputs), with_two_outputs(outputs, keras.Model)
    losses_found = fit(model, *SOURCE[source](X, FORMS[form](GOOD, SECOND)), class_weight=BY_OUTPUT)["loss"]
    weights = FORMS[outputs](*WEIGHTS.values())
    expected = fit(other, X, FORMS[outputs](GOOD, SECOND), sample_weight=weights)["loss"]
    close(losses_found, expected)
    close(model.layers[1].kernel, other.layers[1].kernel)
    close(model.layers[2].kernel, other.layers[2].kernel)


@from_all
@pytest.mark.parametrize("form", FORMS)
def test_own_train_step_gets_class_weight_as_sample_weights_like_y(form, source):
    class Own(hl.Model):
        def train_step(self, data):
            x, y, sample_weight = data
            assert type(sample_weight) is type(y)
            a, b = sample_weight.values() if isinstance(y, dict) else sample_weight
            self.compute_loss(x, y, self(x), sample_weight)
            return {"a": ops.sum(a), "b": ops.sum(b)}

    history = fit(with_two_outputs(cls=Own), *SOURCE[source](X, FORMS[form](GOOD, SECOND)), class_weight=BY_OUTPUT)
    close([history["a"], history["b"]], [[9.0], [9.0]])


def test_train_on_batch_counts_an_output_without_class_weight_once():
    found = with_two_outputs().train_on_batch(X, [GOOD, SECOND], class_weight={"a": BY_OUTPUT["a"]}, return_dict=True)
    weights = [WEIGHTS["a"], np.ones(6, "float32")]
    expected = with_two_outputs().train_on_batch(X, [GOOD, SECOND], sample_weight=weights, return_dict=True)
    close(found["loss"], expected["loss"])


def test_compute_loss_takes_the_sample_weight_of_each_output_by_its_name():
    by_name = with_two_outputs().evaluate(X, {"a": GOOD, "b": SECOND}, sample_weight=WEIGHTS, verbose=0)
    in_order = with_two_outputs(cls=keras.Model).evaluate(
        X, [GOOD, SECOND], sample_weight=list(WEIGHTS.values()), verbose=0
    )
    close(by_name[0], in_order[0])


@pytest.mark.parametrize(
    ("y", "class_weight", "message"),
    [
        ([GOOD, SECOND], {"c": {0: 2.0}}, r"the outputs \['c'\]; y has the labels of \['a', 'b'\].*HL441"),
        (GOOD, BY_OUTPUT, r"outputs without names.*for a single output, class_weight=\{class: weight\}.*HL441"),
        ([GOOD, SECOND], {0: 2.0}, r"for each by its name: class_weight=\{'output': .*HL402"),
        ([GOOD, SECOND], {"a": {0: -1.0}}, "finite numbers, 0 or more.*HL401"),
    ],
)
def test_fit_refuses_a_class_weight_that_does_not_fit_the_outputs(y, class_weight, message):
    with pytest.raises(DataError, match=message):
        fit(with_two_outputs(), X, y, class_weight=class_weight)
