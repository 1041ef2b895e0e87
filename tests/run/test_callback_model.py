"""What a plain step trains, as the model that callbacks know."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import StepError
from handloom.optimizers import NamedOptimizers
from tests.callbacks.scripted import number

X = np.ones((4, 1), dtype="float32")


def net():
    return keras.Sequential([keras.Input((1,)), layers.Dense(1)])


def step(x):
    return {"mean": ops.mean(x)}


class Look(keras.callbacks.Callback):
    """Calls a function with the model, when training begins."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def on_train_begin(self, logs=None):
        self.look(self.model)


def seen(state, look=lambda model: model):
    """What a function makes of `self.model` while a plain step runs."""
    found = []
    hl.fit(step, X, state=state, callbacks=[Look(lambda model: found.append(look(model)))], verbose=0)
    return found[0]


def assert_equal(values, others):
    for value, other in zip(values, others, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize(
    "state",
    [lambda model: model, lambda model: {"net": model}, lambda model: [1, {"deep": (model, "words")}]],
    ids=["itself", "in a dict", "deep"],
)
def test_one_model_is_itself(state):
    model = net()
    assert seen(state(model)) is model


def test_a_model_beside_layers_and_variables_is_itself():
    model = net()
    assert seen({"model": model, "temperature": keras.Variable(1.0), "layer": layers.Dense(1)}) is model


def test_several_models_are_one_that_has_each_under_its_name():
    generator, critic = net(), net()
    both = seen({"generator": generator, "nets": {"critic": critic}})
    assert both.generator is generator
    assert both.nets_critic is critic
    assert_equal(both.get_weights(), [*generator.get_weights(), *critic.get_weights()])
    both.set_weights([np.full(weight.shape, 7.0) for weight in both.get_weights()])
    assert all((weight == 7).all() for model in (generator, critic) for weight in model.get_weights())


def test_in_a_tuple_their_names_are_numbered():
    one, other = net(), net()
    both = seen((one, other))
    assert (both.model_0, both.model_1) == (one, other)


def test_a_name_that_keras_needs_itself_is_kept_apart():
    one, other = net(), net()
    both = seen({"loss": one, "name": other})
    assert (both.loss_, both.name_) == (one, other)


def test_models_that_are_built_by_the_step_count_once_they_are():
    generator, critic = keras.Sequential([layers.Dense(1)]), keras.Sequential([layers.Dense(2)])
    held = []

    def step(x):
        return {"mean": ops.mean(generator(x)) + ops.mean(critic(x))}

    hl.fit(step, X, state={"g": generator, "c": critic}, callbacks=[Look(held.append)], verbose=0)
    assert [weight.shape for weight in held[0].get_weights()] == [(1, 2), (2,), (1, 1), (1,)]


def test_variables_alone_are_restored_and_saved_too(tmp_path):
    one, other = keras.Variable(1.0), keras.Variable([2.0, 3.0])
    path = tmp_path / "all.weights.h5"
    held = seen({"one": one, "other": other}, lambda model: (model.get_weights(), model.save_weights(path), model))
    assert_equal(held[0], [1.0, [2.0, 3.0]])
    one.assign(9.0)
    held[2].load_weights(path)
    assert number(one) == 1.0


def test_weights_of_several_models_go_into_one_file_and_back(tmp_path):
    path = tmp_path / "{epoch}.weights.h5"
    generator, critic = net(), net()
    state = {"generator": generator, "critic": critic}
    before = generator.get_weights(), critic.get_weights()
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    hl.fit(step, X, state=state, callbacks=[checkpoint], verbose=0)
    generator.set_weights([np.zeros((1, 1)), np.ones(1)])
    critic.set_weights([np.zeros((1, 1)), np.ones(1)])
    seen(state, lambda model: model.load_weights(tmp_path / "1.weights.h5"))
    assert_equal(generator.get_weights(), before[0])
    assert_equal(critic.get_weights(), before[1])


def test_several_models_are_saved_and_loaded_as_one(tmp_path):
    generator, critic = net(), net()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "all.keras")
    state = {"generator": generator, "critic": critic, "optimizer": keras.optimizers.SGD()}
    hl.fit(step, X, state=state, callbacks=[checkpoint], verbose=0)
    loaded = keras.models.load_model(tmp_path / "all.keras")
    assert_equal(loaded.generator.get_weights(), generator.get_weights())
    np.testing.assert_allclose(loaded.critic.predict(X, verbose=0), critic.predict(X, verbose=0), rtol=1e-6)


def test_variables_are_no_model_to_save(tmp_path):
    with pytest.raises(StepError, match="save_weights_only=True"):
        seen({"w": keras.Variable(1.0)}, lambda model: model.save(tmp_path / "w.keras"))


@pytest.mark.parametrize("state", [None, {}, {"optimizer": keras.optimizers.SGD()}], ids=["none", "empty", "optimizer"])
@pytest.mark.parametrize("method", ["get_weights", "set_weights", "save_weights", "load_weights", "save"])
def test_without_a_model_its_weights_cannot_be_had(state, method):
    with pytest.raises(StepError, match=r'hl.fit\(..., state=\{"model": model\}\)'):
        seen(state, lambda model: getattr(model, method)("path"))


# --------------------------------------------------------------------- optimizer


def test_the_optimizer_is_found_at_the_model_while_it_trains():
    model, optimizer = net(), keras.optimizers.SGD()
    before = dict(vars(model))
    assert seen({"model": model, "optimizer": optimizer}, lambda model: model.optimizer) is optimizer
    assert vars(model).get("optimizer") is before.get("optimizer")
    assert not model.compiled


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_model_is_as_it_was(error):
    model = net()
    model.compile("adam", "mse")
    before = model.optimizer

    def fail(model):
        assert model.optimizer is not before
        raise error

    with pytest.raises(error):
        seen({"model": model, "optimizer": keras.optimizers.SGD()}, fail)
    assert model.optimizer is before
    model.fit(X, X, verbose=0)


def test_a_compiled_model_keeps_its_optimizer_where_the_state_has_none():
    model = net()
    model.compile("adam", "mse")
    assert seen({"model": model}, lambda model: model.optimizer) is model.optimizer


def test_without_a_model_the_optimizer_is_found_too():
    optimizer = keras.optimizers.SGD()
    assert seen(optimizer, lambda model: model.optimizer) is optimizer


def test_several_optimizers_are_known_by_their_names():
    one, other = keras.optimizers.SGD(), keras.optimizers.Adam()
    state = {"g": net(), "d": net(), "optimizers": {"g": one, "d": other}}
    found = seen(state, lambda model: model.optimizer)
    assert isinstance(found, NamedOptimizers)
    assert (found["optimizers_g"], found["optimizers_d"]) == (one, other)


def test_keras_s_schedule_reaches_an_optimizer_in_the_state(eagerly):
    weight, optimizer = keras.Variable(0.0), keras.optimizers.SGD(1.0)

    def step(x):
        return {"loss": hl.minimize(lambda: -weight * ops.mean(x), [weight], optimizer)}

    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    hl.fit(step, X, epochs=3, state={"w": weight, "o": optimizer}, callbacks=[schedule], verbose=0)
    assert number(weight) == 0.5 + 0.25 + 0.125
