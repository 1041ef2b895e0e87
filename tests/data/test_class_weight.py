"""Labels outside the classes are found before they are trained on; nothing else is."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers, losses, ops

import handloom as hl
from handloom.errors import DataError

X = np.linspace(-1, 1, 12, dtype="float32").reshape(6, 2)
GOOD, BAD = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 0, 3, 3])
NAMED = r"y has the label 3 \(at \[4\], one of 2 such\), but the model has 3 outputs, for classes 0 to 2"


class Net(hl.Model):
    """Subclassed, and built by its first batch."""

    def __init__(self, units=3):
        super().__init__()
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)


def functional(units=3):
    inputs = keras.Input((2,))
    return hl.Model(inputs, layers.Dense(units)(inputs))


KINDS = {"functional": functional, "sequential": lambda: hl.Model([layers.Dense(3)]), "subclassed": Net}
every_kind = pytest.mark.parametrize("kind", KINDS)


def compiled(model, loss=None):
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True) if loss is None else loss)
    return model


def weights(model):
    return [weight.copy() for weight in model.get_weights()]


@every_kind
@pytest.mark.parametrize("loss", [None, "sparse_categorical_crossentropy", losses.sparse_categorical_crossentropy])
def test_a_label_outside_the_classes_is_named_with_the_cure(kind, loss):
    model = compiled(KINDS[kind](), loss)
    with pytest.raises(DataError, match=NAMED + ".*Number the classes from 0, or give the last layer as many units"):
        model.fit(X, BAD, verbose=0)


def test_a_negative_label_is_outside_the_classes():
    with pytest.raises(DataError, match=r"the label -1 \(at \[2\]"):
        compiled(functional()).fit(X, np.array([0, 1, -1, 0, 1, 2]), verbose=0)


@pytest.mark.parametrize(
    ("labels", "label", "place"),
    [
        (BAD[:, None], "3", r"\[4, 0\]"),
        (BAD.astype("float32"), "3.0", r"\[4\]"),
        (BAD.astype("uint8"), "3", r"\[4\]"),
        (pd.Series(BAD, index=range(10, 16)), "3", r"\[4\]"),
        (pd.DataFrame({"label": BAD}), "3", r"\[4, 0\]"),
    ],
    ids=["column", "floats", "uint8", "Series", "DataFrame"],
)
def test_labels_of_any_form_are_checked(labels, label, place):
    with pytest.raises(DataError, match=rf"the label {label} \(at {place}"):
        compiled(functional()).fit(X, labels, verbose=0)


def test_labels_that_are_tensors_are_checked():
    with pytest.raises(DataError, match=NAMED):
        compiled(functional()).fit(ops.convert_to_tensor(X), ops.convert_to_tensor(BAD), verbose=0)


def test_the_label_of_a_pixel_is_named_by_its_place():
    inputs = keras.Input((4, 4, 1))
    model = compiled(hl.Model(inputs, layers.Conv2D(3, 1)(inputs)))
    labels = np.zeros((2, 4, 4), "int32")
    labels[1, 2, 3] = 7
    with pytest.raises(DataError, match=r"the label 7 \(at \[1, 2, 3\], one of 1 such\)"):
        model.fit(np.zeros((2, 4, 4, 1), "float32"), labels, verbose=0)


@every_kind
def test_weights_are_untouched_and_the_model_is_usable_afterwards(kind):
    model = compiled(KINDS[kind]())
    model(X)
    before = weights(model)
    with pytest.raises(DataError, match="y has the label"):
        model.fit(X, BAD, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert np.isfinite(model.fit(X, GOOD, verbose=0).history["loss"]).all()


@every_kind
def test_looking_at_the_classes_does_not_change_how_a_model_trains(kind):
    def trained(loss):
        keras.utils.set_random_seed(1)
        model = compiled(KINDS[kind](), loss)
        return model.fit(X, GOOD, batch_size=2, epochs=2, verbose=0).history["loss"]

    def unchecked(y_true, y_pred):
        return losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    np.testing.assert_allclose(trained(None), trained(unchecked), rtol=1e-6)


@pytest.mark.parametrize("call", ["evaluate", "train_on_batch", "test_on_batch"])
def test_every_method_that_takes_labels_checks_them(call):
    options = {"verbose": 0} if call == "evaluate" else {}
    with pytest.raises(DataError, match=NAMED):
        getattr(compiled(functional()), call)(X, BAD, **options)


def test_the_labels_of_validation_are_checked_before_training():
    model = compiled(functional())
    before = weights(model)
    with pytest.raises(DataError, match=NAMED):
        model.fit(X, GOOD, validation_data=(X, BAD), verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_the_labels_of_a_source_are_checked_batch_by_batch():
    seen = []

    def batches():
        for labels in (GOOD, GOOD, BAD):
            seen.append(labels)
            yield X, labels

    with pytest.raises(DataError, match=NAMED):
        compiled(functional()).fit(batches(), verbose=0)
    assert len(seen) == 3


@pytest.mark.parametrize("source", ["function", "PyDataset", "list"])
def test_sources_of_every_kind_are_checked(source):
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return X, BAD, np.ones(6, "float32")

    sources = {"function": lambda: iter([(X, BAD)]), "PyDataset": Data(), "list": iter([[X, BAD]])}
    with pytest.raises(DataError, match=NAMED):
        compiled(functional()).evaluate(sources[source], verbose=0)


FEEDS = {
    "arrays": lambda y: hl.Feed((X, y), batch_size=2),
    "batches": lambda y: hl.Feed(lambda: iter([(X, y)])),
}


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_the_labels_in_a_feed_are_checked(feed, method):
    with pytest.raises(DataError, match=NAMED):
        getattr(compiled(functional()), method)(FEEDS[feed](BAD), verbose=0)


@pytest.mark.parametrize("feed", FEEDS)
def test_a_feed_is_free_of_a_model_s_checks_when_it_is_used_elsewhere(feed):
    given = FEEDS[feed](BAD)
    with pytest.raises(DataError, match=NAMED):
        compiled(functional()).fit(given, verbose=0)
    assert np.isfinite(compiled(functional(9)).fit(given, verbose=0).history["loss"]).all()
    seen = np.concatenate([ops.convert_to_numpy(y) for _, y in given])
    np.testing.assert_array_equal(seen, BAD)


def test_a_source_has_its_model_s_classes_counted_once():
    class Counting(Net):
        counted = 0

        def compute_output_spec(self, *args, **kwargs):
            self.counted += 1
            return super().compute_output_spec(*args, **kwargs)

    model = compiled(Counting())
    model.fit(iter([(X, GOOD)] * 20), verbose=0)
    assert model.counted == 1


def test_the_ignored_class_is_inside():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    ignored = np.array([0, 1, -1, 0, 1, -1])
    assert np.isfinite(compiled(functional(), loss).fit(X, ignored, verbose=0).history["loss"]).all()
    with pytest.raises(DataError, match=r"the label 5 \(at \[0\], one of 1 such\)"):
        compiled(functional(), loss).fit(X, np.array([5, 1, -1, 0, 1, -1]), verbose=0)


# --------------------------------------------------------------------------- no false alarms


def test_a_model_that_cannot_say_how_many_classes_it_has_trains():
    class Silent(Net):
        def compute_output_spec(self, *args, **kwargs):
            raise NotImplementedError("Nobody knows.")

    history = compiled(Silent()).fit(X, GOOD, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(history).all()


def test_an_unbuilt_model_with_an_output_of_any_size_trains():
    class AnySize(Net):
        def compute_output_spec(self, x):
            return keras.KerasTensor((None, None), "float32")

    assert np.isfinite(compiled(AnySize()).fit(X, GOOD, verbose=0).history["loss"]).all()


@pytest.mark.parametrize(
    ("loss", "labels", "units"),
    [
        ("mse", BAD.astype("float32")[:, None] * 100, 1),
        ("binary_crossentropy", np.array([0, 1, 0, 1, 1, 0])[:, None], 1),
        ("categorical_crossentropy", np.eye(3, dtype="float32")[GOOD], 3),
        ("categorical_focal_crossentropy", np.eye(3, dtype="float32")[GOOD], 3),
        ("hinge", np.array([-1, 1, -1, 1, 1, -1])[:, None], 1),
    ],
)
def test_other_losses_take_what_they_take(loss, labels, units):
    assert np.isfinite(compiled(functional(units), loss).fit(X, labels, verbose=0).history["loss"]).all()


def test_labels_of_several_outputs_are_left_to_their_losses():
    inputs = keras.Input((2,))
    outputs = {"a": layers.Dense(3, name="a")(inputs), "b": layers.Dense(1, name="b")(inputs)}
    model = hl.Model(inputs, outputs)
    model.compile("sgd", {"a": losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"})
    labels = {"a": GOOD, "b": np.full((6, 1), 50.0, "float32")}
    assert np.isfinite(model.fit(X, labels, verbose=0).history["loss"]).all()


def test_a_model_with_a_step_of_its_own_and_no_compiled_loss_takes_any_label():
    class Own(Net):
        def train_step(self, data):
            _, y = data
            return {"y": ops.mean(ops.cast(y, "float32"))}

    assert Own().fit(X, 100 * GOOD, verbose=0).history["y"] == [100.0]


def test_predicting_looks_at_no_labels():
    model = compiled(functional())
    np.testing.assert_array_equal(model.predict(iter([(X, BAD)]), verbose=0), model.predict(X, verbose=0))


def test_labels_that_are_only_just_inside_pass():
    assert np.isfinite(compiled(functional()).evaluate(X, np.full(6, 2), verbose=0))
    assert np.isfinite(compiled(functional()).evaluate(X, np.zeros(6), verbose=0))
