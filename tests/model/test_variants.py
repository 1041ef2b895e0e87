"""Functional, sequential and subclassed models of one class, in one process."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom._model.variants import is_inputs_and_outputs, is_list_of_layers, variant

X = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)


class Doubled(hl.Model):
    """Has a step of its own, and can be of any kind."""

    def predict_step(self, data):
        return 2 * super().predict_step(data)


class DoubledTwice(Doubled):
    def predict_step(self, data):
        return 2 * super().predict_step(data)


def functional(cls):
    inputs = keras.Input((3,))
    return cls(inputs, layers.Dense(2, kernel_initializer="ones")(inputs))


def sequential(cls):
    return cls([layers.Dense(2, kernel_initializer="ones")])


def subclassed(cls):
    class Subclassed(cls):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2, kernel_initializer="ones")

        def call(self, x):
            return self.dense(x)

    return Subclassed()


KINDS = [functional, sequential, subclassed]


def predicted(model):
    with hl.run_eagerly(True):
        return model.predict(X, verbose=0)


def by_hand(factor):
    return factor * np.repeat(X.sum(axis=1, keepdims=True), 2, axis=1)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_every_kind_works_after_every_other(first, second):
    for make in (first, second, first):
        np.testing.assert_allclose(predicted(make(Doubled)), by_hand(2), rtol=1e-6)


@pytest.mark.parametrize("order", [[Doubled, DoubledTwice], [DoubledTwice, Doubled]], ids=["base first", "base last"])
@pytest.mark.parametrize("make", KINDS)
def test_a_subclass_of_a_subclass_is_of_any_kind_too(order, make):
    for cls in [*order, *order]:
        np.testing.assert_allclose(predicted(make(cls)), by_hand(4 if cls is DoubledTwice else 2), rtol=1e-6)


@pytest.mark.once
def test_a_functional_model_is_one_of_its_own_class_and_of_keras():
    model = functional(Doubled)
    assert isinstance(model, Doubled)
    assert isinstance(model, hl.Model)
    assert isinstance(model, keras.Model)
    assert type(model).__name__ == "Doubled"
    assert model.inputs[0].shape == (None, 3)
    assert not isinstance(model, keras.Sequential)


@pytest.mark.once
def test_a_list_of_layers_makes_a_sequential_model():
    model = sequential(Doubled)
    assert isinstance(model, Doubled)
    assert isinstance(model, keras.Sequential)
    model.add(layers.Dense(5))
    assert model(X).shape == (4, 5)


@pytest.mark.once
def test_making_a_functional_model_leaves_its_class_as_it_was():
    class Own(Doubled):
        pass

    before = {cls: cls.__bases__ for cls in (Own, Doubled, hl.Model)}
    functional(Own)
    sequential(Own)
    assert before == {cls: cls.__bases__ for cls in before}
    assert not issubclass(Own, keras.Sequential)


@pytest.mark.once
@pytest.mark.parametrize("make", KINDS)
def test_plain_keras_models_are_as_ever(make):
    """Keras itself makes a plain subclass functional; ours must neither help nor hinder."""

    class Plain(keras.Model):
        pass

    for other in KINDS:
        other(Doubled)
    model = keras.Sequential([layers.Dense(2, kernel_initializer="ones")]) if make is sequential else make(Plain)
    assert not isinstance(model, hl.Model)
    np.testing.assert_allclose(model.predict(X, verbose=0), by_hand(1), rtol=1e-6)


@pytest.mark.once
def test_every_functional_model_of_a_class_is_of_the_same_class():
    assert type(functional(Doubled)) is type(functional(Doubled)) is not type(sequential(Doubled))
    assert variant(Doubled, keras.Sequential) is type(sequential(Doubled))
    assert type(subclassed(Doubled)).__bases__ == (Doubled,)


def test_a_functional_model_may_be_defined_by_its_constructor():
    class Classifier(hl.Model):
        def __init__(self, features, classes):
            inputs = keras.Input((features,))
            super().__init__(inputs=inputs, outputs=layers.Dense(classes, kernel_initializer="ones")(inputs))

    assert predicted(Classifier(3, 7)).shape == (4, 7)
    assert Classifier(3, 7).count_params() == 28


def test_a_constructor_of_two_arguments_makes_no_functional_model():
    class Pair(hl.Model):
        def __init__(self, encoder, decoder):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder

        def call(self, x):
            return self.decoder(self.encoder(x))

    functional(hl.Model)
    model = Pair(layers.Dense(2, kernel_initializer="ones"), layers.Dense(2, kernel_initializer="identity"))
    np.testing.assert_allclose(predicted(model), by_hand(1), rtol=1e-6)
    assert not hasattr(model, "inputs")


def test_a_constructor_that_takes_a_list_of_layers_makes_no_sequential_model():
    class Sum(hl.Model):
        def __init__(self, branches):
            super().__init__()
            self.branches = branches

        def call(self, x):
            return sum(branch(x) for branch in self.branches)

    model = Sum([layers.Dense(2, kernel_initializer="ones") for _ in range(3)])
    assert not isinstance(model, keras.Sequential)
    np.testing.assert_allclose(predicted(model), by_hand(3), rtol=1e-6)


@pytest.mark.once
def test_a_constructor_that_passes_layers_on_is_told_of_sequential():
    class Stack(hl.Model):
        def __init__(self, units):
            super().__init__([layers.Dense(units)])

    with pytest.raises(TypeError, match=r"Stack passes a list of layers .* subclass hl\.Sequential"):
        Stack(3)


def test_sequential_may_have_a_constructor_of_its_own():
    class Stack(hl.Sequential):
        def __init__(self, units):
            super().__init__([layers.Dense(units, kernel_initializer="ones")])

    assert predicted(Stack(3)).shape == (4, 3)


def test_sequential_grows_layer_by_layer():
    model = hl.Sequential()
    model.add(keras.Input((3,)))
    model.add(layers.Dense(2, kernel_initializer="ones"))
    assert isinstance(model, hl.Model)
    np.testing.assert_allclose(predicted(model), by_hand(1), rtol=1e-6)


def test_the_same_class_saves_and_loads_models_of_either_kind(tmp_path):
    @keras.saving.register_keras_serializable("test_variants")
    class Kept(Doubled):
        pass

    for make in (functional, sequential):
        model = make(Kept)
        model.build((None, 3))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded) is type(model)
        np.testing.assert_array_equal(predicted(loaded), predicted(model))


@pytest.mark.once
def test_a_subclassed_model_and_its_class_are_registered_under_one_name():
    @keras.saving.register_keras_serializable("test_variants")
    class Named(Doubled):
        pass

    functional(Named).get_config()
    assert keras.saving.get_registered_object("test_variants>Named") is Named
    assert keras.saving.get_registered_name(type(functional(Named))) == "test_variants>Named"


@pytest.mark.once
def test_a_class_registered_after_its_first_functional_instance_is_loaded(tmp_path):
    class Late(Doubled):
        pass

    model = functional(Late)
    keras.saving.register_keras_serializable("test_variants")(Late)
    model.save(tmp_path / "late.keras")
    loaded = keras.saving.load_model(tmp_path / "late.keras")
    assert isinstance(loaded, Late)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


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
        ((), {"name": "model"}, False),
        (("in", "out", "more"), {}, False),
    ],
)
def test_inputs_and_outputs_are_recognized_as_keras_does(args, kwargs, expected):
    assert is_inputs_and_outputs(args, kwargs) is expected
    assert keras.src.models.model.functional_init_arguments(args, kwargs) is expected


@pytest.mark.once
def test_a_list_of_layers_is_nothing_but_layers():
    dense = layers.Dense(1)
    assert is_list_of_layers(([dense],))
    assert is_list_of_layers(((keras.Input((2,)), dense),))
    for other in [(), ([],), (dense,), ([dense, "relu"],), ([dense], [dense]), ("layers",)]:
        assert not is_list_of_layers(other)
