"""Functional, sequential and subclassed models of one class, in one process."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom._model.variants import is_inputs_and_outputs, is_list_of_layers
from tests.models import KINDS, functional, sequential
from tests.numbers import close, same, same_values

X = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
registered = keras.saving.register_keras_serializable("test_variants")
kinds = pytest.mark.parametrize("kind", KINDS)


class Doubled(hl.Model):
    """Has a custom step, and can be of any kind."""

    def predict_step(self, data):
        return 2 * super().predict_step(data)


class DoubledTwice(Doubled):
    def predict_step(self, data):
        return 2 * super().predict_step(data)


def summing(units=2):
    return layers.Dense(units, kernel_initializer="ones")


def make(kind, cls):
    return KINDS[kind](summing(), cls=cls)


def predicted(model):
    with hl.run_eagerly(True):
        return model.predict(X, verbose=0)


def by_hand(factor):
    return factor * np.repeat(X.sum(axis=1, keepdims=True), 2, axis=1)


@kinds
@pytest.mark.parametrize("second", KINDS)
def test_model_of_every_kind_works_after_every_other(kind, second):
    for each in (kind, second, kind):
        close(predicted(make(each, Doubled)), by_hand(2))


@kinds
@pytest.mark.parametrize("order", [[Doubled, DoubledTwice], [DoubledTwice, Doubled]], ids=["base first", "base last"])
def test_model_subclassed_twice_may_be_of_any_kind(order, kind):
    for cls in [*order, *order]:
        close(predicted(make(kind, cls)), by_hand(4 if cls is DoubledTwice else 2))


@pytest.mark.once
def test_model_of_inputs_and_outputs_is_of_its_class_and_functional():
    model = functional(cls=Doubled)
    assert isinstance(model, Doubled)
    assert not isinstance(model, keras.Sequential)
    assert type(model).__name__ == "Doubled"
    assert model.inputs[0].shape == (None, 3)


@pytest.mark.once
def test_model_of_a_list_of_layers_is_of_its_class_and_sequential():
    model = Doubled([layers.Dense(2)])
    assert isinstance(model, Doubled)
    assert isinstance(model, keras.Sequential)
    model.add(layers.Dense(5))
    assert model(X).shape == (4, 5)
    assert type(hl.Sequential([layers.Dense(2)])) is hl.Sequential


@pytest.mark.once
def test_model_leaves_the_bases_of_its_class_as_they_are():
    class Custom(Doubled):
        pass

    before = {cls: cls.__bases__ for cls in (Custom, Doubled, hl.Model)}
    functional(cls=Custom)
    sequential(cls=Custom)
    assert before == {cls: cls.__bases__ for cls in before}
    assert not issubclass(Custom, keras.Sequential)


@pytest.mark.once
@kinds
def test_model_does_not_change_models_of_keras(kind):
    """Keras itself makes a plain subclass functional."""
    for other in KINDS:
        make(other, Doubled)
    plain = keras.Sequential if kind == "sequential" else type("Plain", (keras.Model,), {})
    model = make(kind, plain)
    assert not isinstance(model, hl.Model)
    close(model.predict(X, verbose=0), by_hand(1))


def test_model_may_become_functional_in_the_constructor_of_a_subclass():
    class Classifier(hl.Model):
        def __init__(self, features, classes):
            inputs = keras.Input((features,))
            super().__init__(inputs=inputs, outputs=layers.Dense(classes)(inputs))

    assert predicted(Classifier(3, 7)).shape == (4, 7)
    assert Classifier(3, 7).count_params() == 28


def test_model_with_a_constructor_of_two_arguments_is_not_functional():
    class Pair(hl.Model):
        def __init__(self, encoder, decoder):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder

        def call(self, x):
            return self.decoder(self.encoder(x))

    functional()
    model = Pair(summing(), layers.Dense(2, kernel_initializer="identity"))
    close(predicted(model), by_hand(1))
    assert not hasattr(model, "inputs")


def test_model_with_a_constructor_that_takes_a_list_of_layers_is_not_sequential():
    class Sum(hl.Model):
        def __init__(self, branches):
            super().__init__()
            self.branches = branches

        def call(self, x):
            return sum(branch(x) for branch in self.branches)

    model = Sum([summing() for _ in range(3)])
    assert not isinstance(model, keras.Sequential)
    close(predicted(model), by_hand(3))


@pytest.mark.once
def test_model_refuses_layers_from_a_constructor_and_names_sequential():
    class Stack(hl.Model):
        def __init__(self, units):
            super().__init__([layers.Dense(units)])

    with pytest.raises(TypeError, match=r"Stack passes a list of layers .*class Stack\(hl\.Sequential\).*HL032"):
        Stack(3)


def test_sequential_may_have_a_custom_constructor():
    class Stack(hl.Sequential):
        def __init__(self, units):
            super().__init__([summing(units)])

    assert predicted(Stack(3)).shape == (4, 3)


def test_sequential_grows_layer_by_layer():
    model = hl.Sequential()
    model.add(keras.Input((3,)))
    model.add(summing())
    assert isinstance(model, hl.Model)
    close(predicted(model), by_hand(1))


@pytest.mark.parametrize("make", [functional, sequential])
def test_load_model_gives_either_kind_of_a_registered_class(make, tmp_path):
    model = make(cls=registered(type("Kept", (Doubled,), {})))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    same(predicted(loaded), predicted(model))


@pytest.mark.once
def test_load_model_finds_a_class_that_was_registered_after_its_first_functional_instance(tmp_path):
    class Late(Doubled):
        pass

    model = functional(cls=Late)
    registered(Late)
    model.save(tmp_path / "late.keras")
    loaded = keras.saving.load_model(tmp_path / "late.keras")
    assert isinstance(loaded, Late)
    same_values(model, loaded)
    assert keras.saving.get_registered_object("test_variants>Late") is Late
    assert keras.saving.get_registered_name(type(model)) == "test_variants>Late"


@pytest.mark.once
@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("in", "out"), {}, True),
        ((), {"inputs": "in", "outputs": "out"}, True),
        (("in",), {"outputs": "out"}, True),
        ((), {}, False),
        (("in",), {}, False),
        ((), {"inputs": "in"}, False),
        ((), {"outputs": "out"}, False),
        (("in", "out", "more"), {}, False),
    ],
)
def test_is_inputs_and_outputs_recognizes_them_as_keras_does(args, kwargs, expected):
    assert is_inputs_and_outputs(args, kwargs) is expected
    assert keras.src.models.model.functional_init_arguments(args, kwargs) is expected


@pytest.mark.once
def test_is_list_of_layers_accepts_nothing_else():
    dense = layers.Dense(1)
    assert is_list_of_layers(([dense],), {})
    assert is_list_of_layers(((keras.Input((2,)), dense),), {})
    for other in [(), ([],), (dense,), ([dense, "relu"],), ([dense], [dense]), ("layers",)]:
        assert not is_list_of_layers(other, {})
    assert not is_list_of_layers(([keras.Input((2,))],), {"outputs": dense})


def test_model_takes_a_list_of_inputs_by_position_and_outputs_by_name():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    for cls in (hl.Model, Doubled):
        model = cls(inputs, outputs=layers.Add()(inputs))
        assert isinstance(model, cls)
        close(model.predict([X, X], verbose=0), (4 if cls is Doubled else 2) * X)
        copy = keras.models.clone_model(model)
        assert type(copy) is type(model)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(functional(summing())))
    assert isinstance(restored, hl.Model)
    assert not isinstance(restored, keras.Sequential)
