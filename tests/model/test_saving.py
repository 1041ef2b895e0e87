"""`hl.Model`s saved, loaded and copied as Keras models."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.models import compiled, functional, sequential
from tests.models import fit as fit_model
from tests.numbers import close, each_close, each_same, normal, numpy, same, same_values

X = normal(20, 3)
Y = X[:, :1] - X[:, 1:2]
registered = keras.saving.register_keras_serializable("test_saving")


@registered
class Subclassed(hl.Model):
    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.hidden, self.head = layers.Dense(units, "tanh"), layers.Dense(1)

    def call(self, x):
        return self.head(self.hidden(x))

    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x) - y) ** 2))}

    def get_config(self):
        return super().get_config() | {"units": self.units}


class Unregistered(hl.Model):
    def predict_step(self, data):
        return 2 * super().predict_step(data)


def normalized(cls=hl.Model):
    hidden = layers.Dense(4, "tanh", name="hidden")
    return functional(hidden, layers.BatchNormalization(), layers.Dense(1, name="head"), cls=cls)


def subclassed(cls=Subclassed):
    model = cls(4)
    model(X)
    return model


KINDS = {
    "functional": normalized,
    "sequential": lambda: sequential(layers.Dense(4, "tanh"), layers.Dense(1), cls=hl.Model),
    "subclassed": subclassed,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def fit(model):
    return fit_model(model, X, Y, epochs=2)


def reloaded(model, path, **options):
    model.save(path / "model.keras")
    return keras.models.load_model(path / "model.keras", **options)


def predicts_the_same(one, other):
    same(one(X), other(X))
    return type(one) is type(other)


@kinds
def test_load_model_gives_a_model_that_trains_on_as_if_it_had_never_been_saved(kind, tmp_path):
    model = compiled(KINDS[kind](), keras.optimizers.Adam(0.01, global_clipnorm=1.0), metrics=["mae"])
    fit(model)
    loaded = reloaded(model, tmp_path)
    assert predicts_the_same(model, loaded)
    same_values(model.optimizer, loaded.optimizer)
    expected, history = fit(model), fit(loaded)
    assert set(history) == set(expected)
    for name in expected:
        close(history[name], expected[name])
    each_close(loaded.get_weights(), model.get_weights())


@pytest.mark.once
def test_load_model_keeps_the_arguments_of_compile(tmp_path):
    given = {"loss": {"head": "mae"}, "loss_weights": {"head": 2.0}, "metrics": [["mse"]], "jit_compile": "auto"}
    model = compiled(normalized(), "sgd", **given)
    fit(model)
    config = reloaded(model, tmp_path).get_compile_config()
    assert {name: config[name] for name in given} == given


@pytest.mark.once
def test_fit_of_a_model_loaded_without_compile_asks_for_it(tmp_path):
    loaded = reloaded(compiled(KINDS["sequential"]()), tmp_path, compile=False)
    with pytest.raises(hl.errors.StepError, match="HL213"):
        fit(loaded)


@pytest.mark.once
def test_load_model_leaves_a_custom_compile_to_the_class_as_keras_does(tmp_path):
    @registered
    class OwnCompile(Subclassed):
        def compile(self, own_optimizer):
            super().compile(optimizer=own_optimizer)

    model = subclassed(OwnCompile)
    model.compile("sgd")
    with pytest.warns(UserWarning, match=r"`compile\(\)` was not called as part of model loading"):
        loaded = reloaded(model, tmp_path)
    assert predicts_the_same(model, loaded)


@pytest.mark.once
def test_load_model_takes_a_class_that_is_not_registered(tmp_path):
    model = normalized(Unregistered)
    loaded = reloaded(model, tmp_path, custom_objects={"Unregistered": Unregistered})
    assert isinstance(loaded, Unregistered)
    with hl.run_eagerly(True):
        close(loaded.predict(X, verbose=0), 2 * numpy(model(X)))


def test_load_weights_reaches_a_model_whose_steps_are_compiled(tmp_path):
    model, other = compiled(normalized(), "adam"), compiled(normalized(), "adam")
    fit(model)
    fit(other)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    same_values(model, other)
    close(other.predict(X, verbose=0), model(X))
    close(fit(other)["loss"], fit(model)["loss"])


def test_load_weights_exchanges_weights_with_a_keras_model(tmp_path):
    ours, theirs = normalized(), normalized(keras.Model)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    same_values(ours, theirs)
    theirs.set_weights([weight + 1 for weight in theirs.get_weights()])
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    same_values(ours, theirs)


@pytest.mark.once
@kinds
def test_from_config_makes_a_model_like_the_one_of_get_config(kind):
    model = KINDS[kind]()
    twin = type(model).from_config(model.get_config())
    twin(X)
    twin.set_weights(model.get_weights())
    assert predicts_the_same(model, twin)


@pytest.mark.once
@pytest.mark.parametrize("cls", [hl.Model, Unregistered])
@pytest.mark.parametrize("make", [functional, sequential])
def test_from_config_of_the_class_itself_makes_a_model_of_any_kind(make, cls):
    model = make(cls=cls)
    twin = cls.from_config(model.get_config())
    assert type(twin) is type(model)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]


def assert_trains_alone(twin, model):
    before = model.get_weights()
    fit(twin)
    each_same(model.get_weights(), before)
    assert not np.array_equal(twin.get_weights()[0], before[0])


@pytest.mark.once
def test_clone_model_gives_a_model_with_its_own_weights_that_trains():
    """Of a functional model; of a sequential one Keras makes a plain `keras.Sequential`."""
    model = normalized()
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    clone.set_weights(model.get_weights())
    assert_trains_alone(compiled(clone), model)


@pytest.mark.once
def test_clone_model_of_hl_sequential_is_of_keras_and_from_config_is_not():
    """Keras names its own class. Once a hook leads to another, the page of departures has one row less."""
    model = sequential(layers.Dense(1), cls=hl.Sequential)
    assert type(keras.models.clone_model(model)) is keras.Sequential
    assert type(hl.Sequential.from_config(model.get_config())) is hl.Sequential


@pytest.mark.once
@kinds
def test_pickle_keeps_a_model_and_its_optimizer(kind):
    model = compiled(KINDS[kind](), "adam")
    model.optimizer.build(model.trainable_variables)
    twin = pickle.loads(pickle.dumps(model))
    assert predicts_the_same(model, twin)
    same_values(model.optimizer, twin.optimizer)


def test_deepcopy_gives_a_model_that_trains_apart_from_the_original():
    model = compiled(normalized(), "adam")
    fit(model)
    twin = copy.deepcopy(model)
    same_values(model, twin)
    assert_trains_alone(twin, model)


@pytest.mark.parametrize("cls", [hl.Sequential, hl.Model])
def test_sequential_and_model_saved_as_h5_load_as_what_they_were(cls, tmp_path):
    make = sequential if cls is hl.Sequential else functional
    model = compiled(make(layers.Dense(1)), loss=keras.losses.MeanSquaredError())
    fit_model(model, X, Y)
    model.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5")
    assert isinstance(loaded, cls)
    same(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert fit_model(loaded, X, Y) == fit_model(model, X, Y)


def test_sequential_of_hl_model_saved_as_h5_loads_as_what_it_was(tmp_path):
    model = KINDS["sequential"]()
    model.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5", compile=False)
    assert type(loaded) is type(model)
    same(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
