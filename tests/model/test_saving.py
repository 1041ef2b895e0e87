"""`hl.Model`s saved, loaded and copied as Keras models."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype("float32")
Y = X[:, :1] - X[:, 1:2]


@keras.saving.register_keras_serializable("test_model_saving")
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


def functional(cls=hl.Model):
    inputs = keras.Input((3,))
    hidden = layers.BatchNormalization()(layers.Dense(4, "tanh", name="hidden")(inputs))
    return cls(inputs, layers.Dense(1, name="head")(hidden))


def sequential():
    return hl.Model([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)])


def subclassed():
    model = Subclassed(4)
    model(X)
    return model


KINDS = [functional, sequential, subclassed]


def fit(model, epochs=2):
    return model.fit(X, Y, batch_size=20, epochs=epochs, shuffle=False, verbose=0).history


def predicted(model):
    return ops.convert_to_numpy(model(X))


def assert_same_arrays(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def reloaded(model, path, **options):
    model.save(path / "model.keras")
    return keras.models.load_model(path / "model.keras", **options)


@pytest.mark.parametrize("make", KINDS)
def test_a_loaded_model_goes_on_as_if_it_had_never_been_saved(make, tmp_path):
    model = make()
    model.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), "mse", metrics=["mae"])
    fit(model)
    loaded = reloaded(model, tmp_path)
    assert type(loaded) is type(model)
    assert_same_arrays([predicted(model)], [predicted(loaded)])
    assert_same_arrays(model.optimizer.variables, loaded.optimizer.variables)
    assert int(loaded.optimizer.iterations) == 2
    expected, history = fit(model), fit(loaded)
    assert set(history) == set(expected)
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-6)
    for one, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(other), ops.convert_to_numpy(one), rtol=1e-5, atol=1e-7)


@keras.saving.register_keras_serializable("test_model_saving")
class TwoParts(hl.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.body, self.head = layers.Dense(4, "tanh"), layers.Dense(1)

    def call(self, x):
        return self.head(self.body(x))


def test_optimizers_by_name_are_loaded_with_their_slots(tmp_path):
    model = TwoParts()
    model.compile({"body": keras.optimizers.Adam(0.01), "*": keras.optimizers.SGD(0.1, momentum=0.9)}, "mse")
    fit(model)
    loaded = reloaded(model, tmp_path)
    assert list(loaded.optimizer) == ["body", "*"]
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables) > 8
    assert_same_arrays(model.optimizer.variables, loaded.optimizer.variables)
    np.testing.assert_allclose(fit(loaded)["loss"], fit(model)["loss"], rtol=1e-6)


def test_a_loss_scale_is_saved(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = sequential()
    model.compile("adam", "mse")
    fit(model)
    model.optimizer.dynamic_scale.assign(256.0)
    loaded = reloaded(model, tmp_path)
    assert isinstance(loaded.optimizer, hl.optimizers.LossScaleOptimizer)
    assert not isinstance(loaded.optimizer.inner_optimizer, keras.optimizers.LossScaleOptimizer)
    assert float(loaded.optimizer.dynamic_scale) == 256.0
    np.testing.assert_allclose(fit(loaded)["loss"], fit(model)["loss"], rtol=1e-3)


@pytest.mark.once
def test_what_compile_was_given_is_kept(tmp_path):
    model = functional()
    model.compile("sgd", {"head": "mae"}, loss_weights={"head": 2.0}, metrics=[["mse"]], jit_compile="auto")
    fit(model, epochs=1)
    config = reloaded(model, tmp_path).get_compile_config()
    assert config["jit_compile"] == "auto"
    assert config["loss"] == {"head": "mae"}
    assert config["loss_weights"] == {"head": 2.0}
    assert config["metrics"] == [["mse"]]


@pytest.mark.once
def test_a_model_loaded_without_compile_has_to_be_compiled(tmp_path):
    model = sequential()
    model.compile("sgd", "mse")
    loaded = reloaded(model, tmp_path, compile=False)
    with pytest.raises(hl.errors.StepError, match=r"Call compile\(\) before fit"):
        fit(loaded)


@pytest.mark.once
def test_a_compile_of_its_own_is_left_to_the_class_as_by_keras(tmp_path):
    @keras.saving.register_keras_serializable("test_model_saving")
    class OwnCompile(Subclassed):
        def compile(self, own_optimizer):
            super().compile(optimizer=own_optimizer)

    model = OwnCompile(4)
    model(X)
    model.compile("sgd")
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match=r"`compile\(\)` was not called as part of model loading"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_arrays([predicted(model)], [predicted(loaded)])


@pytest.mark.once
def test_a_class_that_is_not_registered_is_loaded_when_it_is_named(tmp_path):
    model = functional(Unregistered)
    loaded = reloaded(model, tmp_path, custom_objects={"Unregistered": Unregistered})
    assert isinstance(loaded, Unregistered)
    with hl.run_eagerly(True):
        np.testing.assert_allclose(loaded.predict(X, verbose=0), 2 * predicted(model), rtol=1e-6)


def test_weights_go_into_a_model_whose_steps_are_compiled(tmp_path):
    model, other = functional(), functional()
    for each in (model, other):
        each.compile("adam", "mse")
        fit(each)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_arrays(model.weights, other.weights)
    np.testing.assert_allclose(other.predict(X, verbose=0), predicted(model), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fit(other)["loss"], fit(model)["loss"], rtol=1e-6)


def test_weights_go_over_to_a_plain_keras_model_and_back(tmp_path):
    ours, theirs = functional(), functional(keras.Model)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    assert_same_arrays(ours.weights, theirs.weights)
    theirs.set_weights([weight + 1 for weight in theirs.get_weights()])
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    assert_same_arrays(ours.weights, theirs.weights)


@pytest.mark.once
@pytest.mark.parametrize("make", KINDS)
def test_a_config_makes_a_model_like_it(make):
    model = make()
    twin = type(model).from_config(model.get_config())
    assert type(twin) is type(model)
    twin(X)
    twin.set_weights(model.get_weights())
    assert_same_arrays([predicted(model)], [predicted(twin)])


@pytest.mark.once
@pytest.mark.parametrize("cls", [hl.Model, Unregistered])
@pytest.mark.parametrize("make", [functional, lambda cls: cls([keras.Input((3,)), layers.Dense(1)])])
def test_the_class_itself_makes_a_model_of_any_kind_from_a_config(make, cls):
    model = make(cls)
    twin = cls.from_config(model.get_config())
    assert type(twin) is type(model)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]


@pytest.mark.once
def test_a_clone_has_weights_of_its_own_and_trains():
    """Of a functional model; of a sequential one Keras makes a plain `keras.Sequential`."""
    model = functional()
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    clone.set_weights(model.get_weights())
    clone.compile("sgd", "mse")
    before = model.get_weights()
    fit(clone)
    assert_same_arrays(before, model.get_weights())
    assert not np.array_equal(clone.get_weights()[0], before[0])


@pytest.mark.once
@pytest.mark.parametrize("make", KINDS)
def test_a_model_is_pickled(make):
    model = make()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    assert_same_arrays([predicted(model)], [predicted(twin)])
    assert_same_arrays(model.optimizer.variables, twin.optimizer.variables)


def test_a_deep_copy_trains_apart_from_the_original():
    model = functional()
    model.compile("adam", "mse")
    fit(model)
    twin = copy.deepcopy(model)
    assert_same_arrays(model.weights, twin.weights)
    before = model.get_weights()
    fit(twin)
    assert_same_arrays(before, model.get_weights())
