"""The model that callbacks see while a plain step trains."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import StepError
from handloom.optimizers import NamedOptimizers
from tests.models import compiled, sequential
from tests.numbers import close, each_same, ones

X = ones(4, 1)


def net():
    return sequential(inputs=1, cls=keras.Sequential)


def fit(state, *callbacks, step=lambda x: {"mean": ops.mean(x)}, **options):
    return hl.fit(step, X, state=state, callbacks=callbacks, verbose=0, **options)


def seen(state, look=lambda model: model, **options):
    """The result of a function of `self.model` when training begins."""
    found, callback = [], keras.callbacks.Callback()
    callback.on_train_begin = lambda logs: found.append(look(callback.model))
    fit(state, callback, **options)
    return found[0]


def set_to(value, *models):
    for model in models:
        model.set_weights([np.full(weight.shape, value) for weight in model.get_weights()])


@pytest.mark.parametrize(
    "state",
    [
        lambda model: model,
        lambda model: [1, {"deep": (model, "words")}],
        lambda model: {"model": model, "temperature": keras.Variable(1.0), "layer": layers.Dense(1)},
    ],
    ids=["itself", "deep", "beside layers and variables"],
)
def test_callback_model_is_the_only_model_in_the_state(state):
    model = net()
    assert seen(state(model)) is model


def test_callback_model_of_several_models_has_each_under_its_name():
    generator, critic = net(), net()
    both = seen({"generator": generator, "nets": {"critic": critic}})
    assert both.generator is generator
    assert both.nets_critic is critic
    each_same(both.get_weights(), [*generator.get_weights(), *critic.get_weights()])
    set_to(7.0, both)
    assert all((weight == 7).all() for model in (generator, critic) for weight in model.get_weights())


def test_callback_model_numbers_models_in_a_tuple_and_changes_names_that_keras_uses_itself():
    one, other = net(), net()
    both = seen((one, other))
    assert (both.model_0, both.model_1) == (one, other)
    both = seen({"loss": one, "name": other})
    assert (both.loss_, both.name_) == (one, other)


def test_callback_model_has_the_weights_of_models_that_the_step_builds():
    generator, critic = keras.Sequential([layers.Dense(1)]), keras.Sequential([layers.Dense(2)])
    state = {"g": generator, "c": critic}
    held = seen(state, step=lambda x: {"mean": ops.mean(generator(x)) + ops.mean(critic(x))})
    assert [weight.shape for weight in held.get_weights()] == [(1, 2), (2,), (1, 1), (1,)]


def test_callback_model_of_variables_saves_and_loads_them_but_is_no_model_to_save(tmp_path):
    one, other = keras.Variable(1.0), keras.Variable([2.0, 3.0])
    path = tmp_path / "all.weights.h5"
    weights, _, model = seen(
        {"one": one, "other": other}, lambda model: (model.get_weights(), model.save_weights(path), model)
    )
    each_same(weights, [1.0, [2.0, 3.0]])
    one.assign(9.0)
    model.load_weights(path)
    close(one, 1.0)
    with pytest.raises(StepError, match=r"save_weights_only=True\. \[HL207\]"):
        model.save(tmp_path / "all.keras")


def test_model_checkpoint_saves_several_models_as_one(tmp_path):
    generator, critic = net(), net()
    state = {"generator": generator, "critic": critic, "optimizer": keras.optimizers.SGD()}
    before = [*generator.get_weights(), *critic.get_weights()]
    fit(
        state,
        keras.callbacks.ModelCheckpoint(tmp_path / "all.keras"),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
    )
    loaded = keras.models.load_model(tmp_path / "all.keras")
    each_same([*loaded.generator.get_weights(), *loaded.critic.get_weights()], before)
    close(loaded.critic.predict(X, verbose=0), critic.predict(X, verbose=0))
    set_to(0.0, generator, critic)
    seen(state, lambda model: model.load_weights(tmp_path / "1.weights.h5"))
    each_same([*generator.get_weights(), *critic.get_weights()], before)


@pytest.mark.parametrize("state", [None, {}, {"optimizer": keras.optimizers.SGD()}], ids=["none", "empty", "optimizer"])
@pytest.mark.parametrize("method", ["get_weights", "set_weights", "save_weights", "load_weights", "save"])
def test_callback_model_without_a_model_has_no_weights(state, method):
    with pytest.raises(StepError, match=r'hl.fit\(..., state=\{"model": model\}\)\. \[HL208\]'):
        seen(state, lambda model: getattr(model, method)("path"))


# --------------------------------------------------------------------- optimizer


def test_callback_model_has_the_optimizer_of_the_state_while_it_trains():
    model, optimizer = net(), keras.optimizers.SGD()
    before = dict(vars(model))
    assert seen({"model": model, "optimizer": optimizer}, lambda model: model.optimizer) is optimizer
    assert vars(model).get("optimizer") is before.get("optimizer")
    assert not model.compiled
    assert seen(optimizer, lambda model: model.optimizer) is optimizer  # Without a model, too.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_callback_model_has_its_own_optimizer_again_after_an_exception(error):
    model = compiled(net(), "adam")
    before = model.optimizer

    def fail(model):
        assert model.optimizer is not before
        raise error

    with pytest.raises(error):
        seen({"model": model, "optimizer": keras.optimizers.SGD()}, fail)
    assert model.optimizer is before
    model.fit(X, X, verbose=0)
    assert seen({"model": model}, lambda model: model.optimizer) is before  # Where the state has none.


def test_callback_model_has_several_optimizers_by_their_names():
    one, other = keras.optimizers.SGD(), keras.optimizers.Adam()
    state = {"g": net(), "d": net(), "optimizers": {"g": one, "d": other}}
    found = seen(state, lambda model: model.optimizer)
    assert isinstance(found, NamedOptimizers)
    assert (found["optimizers_g"], found["optimizers_d"]) == (one, other)
