"""Several optimizers of one model, by the names of what they train."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import OptimizerError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
SGD = keras.optimizers.SGD

X = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25], [-1.0, 1.0]], "float32")
Y = np.array([[1.0], [2.0], [-1.0], [0.0]], "float32")


@keras.saving.register_keras_serializable("tests")
class Two(hl.Model):
    """An encoder and a head."""

    def __init__(self, **options):
        super().__init__(**options)
        self.encoder = layers.Dense(2, name="encoder")
        self.head = layers.Dense(1, name="head")

    def build(self, shape):
        self.encoder.build(shape)
        self.head.build((None, 2))

    def call(self, x):
        return self.head(self.encoder(x))


def two():
    model = Two()
    model.build((None, 2))
    model.set_weights([np.array([[0.1, 0.2], [0.3, -0.4]]), np.zeros(2), np.array([[0.5], [-0.6]]), np.zeros(1)])
    return model


def compiled(optimizer, **options):
    model = two()
    model.compile(optimizer, loss="mse", **options)
    return model


def train(model, epochs=1, **options):
    return model.fit(X, Y, batch_size=len(X), epochs=epochs, shuffle=False, verbose=0, **options)


def moved(model, before):
    """Which weights are no longer the same to the bit."""
    return [bool(np.any(now != then)) for now, then in zip(model.get_weights(), before, strict=True)]


def paths(variables):
    return [variable.path.split("/", 1)[1] for variable in variables]


# ---------------------------------------------------------------------- who owns what


def test_every_optimizer_steps_on_its_own_variables_of_the_one_loss(eagerly):
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.02)})
    start = two()
    x, y = ops.convert_to_tensor(X), ops.convert_to_tensor(Y)
    gradients = hl.grad(lambda: ops.mean((start(x) - y) ** 2), wrt=start)()
    train(model)
    rates = [0.1, 0.1, 0.02, 0.02]
    for now, then, gradient, rate in zip(model.get_weights(), start.get_weights(), gradients, rates, strict=True):
        close(now, then - rate * ops.convert_to_numpy(gradient))


def test_optimizers_may_differ_in_kind_and_have_slots_for_their_own_alone():
    model = compiled({"encoder": SGD(0.1, momentum=0.9), "head": "adam"})
    train(model)
    assert len(model.optimizer["encoder"].variables) == 2 + 2
    assert len(model.optimizer["head"].variables) == 2 + 4


def test_the_star_owns_the_rest():
    model = compiled({"head": SGD(0.0), "*": SGD(0.1)})
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [True, True, False, False]
    assert paths(model.optimizer.owners()["*"]) == ["encoder/kernel", "encoder/bias"]


def test_the_star_alone_owns_everything():
    model = compiled({"*": SGD(0.1)})
    before = model.get_weights()
    train(model)
    assert all(moved(model, before))


def test_the_star_may_be_left_with_nothing():
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1), "*": SGD(0.1)})
    before = model.get_weights()
    train(model)
    assert all(moved(model, before))
    assert model.optimizer.owners()["*"] == []


def test_a_dotted_path_leads_to_a_part_of_a_part():
    model = compiled({"encoder.kernel": SGD(0.1), "*": SGD(0.0)})
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [True, False, False, False]


def test_a_name_may_be_a_list_of_layers_or_a_variable():
    class Blocks(hl.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [layers.Dense(2, name="first"), layers.Dense(2, name="second")]
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return ops.sum(x, axis=-1, keepdims=True) * self.scale

    model = Blocks()
    model(X)
    model.compile({"blocks": SGD(0.0), "scale": SGD(0.1)}, loss="mse")
    train(model)
    owners = model.optimizer.owners()
    assert paths(owners["blocks"]) == ["first/kernel", "first/bias", "second/kernel", "second/bias"]
    assert paths(owners["scale"]) == ["scale"]
    assert float(model.scale.numpy()) != 1


def test_a_functional_model_names_its_layers_by_attribute_too():
    model = hl.Model([keras.Input((2,)), layers.Dense(2), layers.Dense(1)])
    model.encoder, model.head = model.layers
    model.compile({"encoder": SGD(0.1), "head": SGD(0.0)}, loss="mse")
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [True, True, False, False]


def test_the_optimizers_may_be_passed_as_an_object():
    model = compiled(hl.optimizers.NamedOptimizers({"encoder": SGD(0.1), "head": SGD(0.0)}))
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [True, True, False, False]


def test_an_optimizer_of_keras_as_a_config_is_one_optimizer():
    model = compiled(keras.optimizers.serialize(SGD(0.25)))
    assert isinstance(model.optimizer, SGD)
    close(model.optimizer.learning_rate.numpy(), 0.25)


def test_a_model_built_by_its_first_batch():
    model = Two()
    model.compile({"encoder": SGD(0.1, momentum=0.9), "head": SGD(0.0)}, loss="mse")
    train(model, epochs=2)
    assert len(model.optimizer["encoder"].variables) == 2 + 2
    assert int(model.optimizer["head"].iterations.numpy()) == 2


# ---------------------------------------------------------------------- in a step of one's own


class Alternating(Two):
    def train_step(self, data):
        x, y = data
        return {
            "first": self.minimize(lambda: ops.mean((self(x) - y) ** 2), wrt=self.encoder),
            "second": self.minimize(lambda: ops.mean(ops.abs(self(x) - y)), wrt=self.head),
        }


def test_minimize_finds_the_owner(eagerly):
    model = Alternating()
    model.build((None, 2))
    model.compile({"encoder": SGD(0.1), "head": SGD(0.0)})
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [True, True, False, False]
    assert [int(model.optimizer[name].iterations.numpy()) for name in model.optimizer] == [1, 1]


def test_minimizing_a_part_moves_that_part_alone():
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1)})
    before = model.get_weights()
    model.minimize(lambda: ops.sum(model(X)), wrt=model.head)
    assert moved(model, before) == [False, False, True, True]
    assert int(model.optimizer["encoder"].iterations.numpy()) == 0


def test_minimizing_half_of_a_part_leaves_slots_for_the_other_half():
    model = compiled({"encoder": SGD(0.1, momentum=0.9), "head": SGD(0.1)})
    model.minimize(lambda: ops.sum(model(X)), wrt=model.encoder.bias)
    model.minimize(lambda: ops.sum(model(X)), wrt=model.encoder.kernel)
    assert len(model.optimizer["encoder"].variables) == 2 + 2


def test_a_variable_of_another_model_has_no_owner():
    model, other = compiled({"encoder": SGD(0.1), "head": SGD(0.1)}), layers.Dense(1, name="other")
    other.build((None, 2))
    with pytest.raises(OptimizerError, match=r"No optimizer of the model owns 'other/kernel'.*optimizer=\.\.\."):
        model.minimize(lambda: ops.sum(other(X)), wrt=other)


# ---------------------------------------------------------------------- mistakes


def test_a_variable_owned_by_nobody_is_an_error_with_its_name_and_those_of_the_optimizers():
    with pytest.raises(OptimizerError, match=r"No optimizer owns '.*head/kernel', '.*head/bias'.*'encoder'.*\"\*\""):
        compiled({"encoder": SGD(0.1)})


def test_a_variable_owned_twice_is_an_error_with_both_names():
    with pytest.raises(OptimizerError, match=r"encoder/kernel' is owned twice, .* 'encoder' and 'encoder\.kernel'"):
        compiled({"encoder": SGD(0.1), "encoder.kernel": SGD(0.1), "*": SGD(0.1)})


def test_a_layer_shared_by_two_parts_is_owned_twice():
    model = two()
    model.tied = [model.head]
    with pytest.raises(OptimizerError, match=r"head/kernel' is owned twice, .* 'head' and 'tied'"):
        model.compile({"head": SGD(0.1), "tied": SGD(0.1), "*": SGD(0.1)})


def test_a_missing_attribute_is_an_error():
    with pytest.raises(OptimizerError, match=r"for 'decoder', but Two has no such attribute .*\"encoder\.head\""):
        compiled({"decoder": SGD(0.1), "*": SGD(0.1)})


def test_a_missing_attribute_further_down_names_where():
    with pytest.raises(OptimizerError, match=r"'encoder\.core'.*'core' is missing on Dense"):
        compiled({"encoder.core": SGD(0.1), "*": SGD(0.1)})


def test_an_attribute_that_is_no_layer_is_an_error():
    with pytest.raises(OptimizerError, match=r"for 'name', but what Two has there is no layer or variable: 'two'"):
        compiled({"name": SGD(0.1), "*": SGD(0.1)})


def test_an_unknown_optimizer_names_its_place():
    with pytest.raises(OptimizerError, match=r"optimizer=\{'encoder': 'sdg'\}"):
        compiled({"encoder": "sdg", "*": "sgd"})


def test_no_optimizers_at_all_is_an_error():
    with pytest.raises(OptimizerError, match="No optimizer was given"):
        compiled({})


def test_an_unbuilt_model_is_checked_once_it_is_built():
    model = Two()
    model.compile({"encoder": SGD(0.1)}, loss="mse")
    with pytest.raises(OptimizerError, match=r"No optimizer owns '.*head/kernel'"):
        train(model)


def test_without_a_model_there_are_no_names():
    w = keras.Variable(1.0)
    with pytest.raises(OptimizerError, match=r"belong to a model: pass them to its compile\(\)"):
        hl.minimize(lambda: w**2, w, hl.optimizers.NamedOptimizers({"*": "sgd"}))


def test_gradients_alone_do_not_tell_whose_they_are():
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1)})
    with pytest.raises(OptimizerError, match="pass the variables too"):
        model.optimizer.apply([ops.ones(variable.shape) for variable in model.trainable_variables])


# ---------------------------------------------------------------------- as a mapping


def test_each_optimizer_is_found_by_its_name():
    encoder, head = SGD(0.1), SGD(0.2)
    optimizers = hl.optimizers.NamedOptimizers({"encoder": encoder, "head": head})
    assert optimizers["head"] is head
    assert list(optimizers) == ["encoder", "head"]
    assert len(optimizers) == 2
    assert dict(optimizers.items()) == {"encoder": encoder, "head": head}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"no optimizer named 'tail'; there are 'encoder', 'head'"):
        hl.optimizers.NamedOptimizers({"encoder": "sgd", "head": "sgd"})["tail"]


def test_there_is_no_one_learning_rate():
    optimizers = hl.optimizers.NamedOptimizers({"encoder": "sgd", "head": "sgd"})
    with pytest.raises(AttributeError, match=r'use optimizer\["encoder"\]\.learning_rate'):
        _ = optimizers.learning_rate


def test_gradients_applied_by_hand_reach_their_owners():
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.2)})
    before, variables = model.get_weights(), model.trainable_variables
    model.optimizer.apply([ops.ones(variable.shape) for variable in reversed(variables)], variables[::-1])
    for now, then, rate in zip(model.get_weights(), before, [0.1, 0.1, 0.2, 0.2], strict=True):
        close(now, then - rate)


# ---------------------------------------------------------------------- over a run


def test_learning_rates_are_changed_one_by_one_without_a_new_trace():
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1)})
    counted = []
    step = hl.function(lambda x, y: counted.append(1) or model.train_step((x, y)))
    step(X, Y)
    traced, before = len(counted), model.get_weights()
    model.optimizer["encoder"].learning_rate = 0.0
    step(X, Y)
    assert moved(model, before) == [False, False, True, True]
    assert len(counted) == traced


def test_a_frozen_part_stays_and_a_thawed_one_moves_again():
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1)})
    model.encoder.trainable = False
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [False, False, True, True]
    model.encoder.trainable = True
    before = model.get_weights()
    train(model)
    assert all(moved(model, before))


def test_a_frozen_part_needs_no_owner():
    model = two()
    model.encoder.trainable = False
    model.compile({"head": SGD(0.1)}, loss="mse")
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [False, False, True, True]


def test_averaged_weights_are_put_in_place_at_the_end_for_their_optimizer_alone():
    seen = []
    watcher = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()))
    model = compiled({"encoder": SGD(0.1, use_ema=True, ema_momentum=0.25), "head": SGD(0.1)})
    train(model, epochs=2, callbacks=[watcher])
    first, second = seen
    close(model.get_weights()[0], 0.25 * first[0] + 0.75 * second[0])
    np.testing.assert_array_equal(model.get_weights()[2], second[2])


def test_averages_of_an_optimizer_that_never_stepped_are_not_put_in_place():
    class HeadOnly(Two):
        def train_step(self, data):
            x, y = data
            return {"loss": self.minimize(lambda: ops.mean((self(x) - y) ** 2), wrt=self.head)}

    model = HeadOnly()
    model.build((None, 2))
    model.compile({"encoder": SGD(0.1, use_ema=True), "head": SGD(0.1, use_ema=True)})
    model.optimizer.build(model.trainable_variables)
    before = model.get_weights()
    train(model)
    assert moved(model, before) == [False, False, True, True]


def test_averaged_weights_find_their_variables_though_some_are_frozen_by_now():
    seen = []
    watcher = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()))
    model = compiled({"layers": SGD(0.1, use_ema=True, ema_momentum=0.25)})
    train(model, callbacks=[watcher])
    model.encoder.trainable = False
    train(model, callbacks=[watcher])
    first, second = seen
    np.testing.assert_array_equal(model.get_weights()[0], first[0])
    close(model.get_weights()[2], 0.25 * first[2] + 0.75 * second[2])


def test_each_optimizer_scales_the_loss_under_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1)})
    before = model.get_weights()
    assert {type(inner) for _, inner in model.optimizer.items()} == {hl.optimizers.LossScaleOptimizer}
    train(model, epochs=3)  # The first overflows in the encoder, and halves its scale alone.
    assert all(moved(model, before)[::2])


# ---------------------------------------------------------------------- saved and loaded


def functional():
    model = hl.Model([keras.Input((2,)), layers.Dense(2, name="encoder"), layers.Dense(1, name="head")])
    model.compile({"layers": keras.optimizers.Adam(0.05)}, loss="mse")
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: compiled({"encoder": SGD(0.1, momentum=0.9), "*": keras.optimizers.Adam(0.05)}), functional],
    ids=["subclassed", "sequential"],
)
def test_a_loaded_model_trains_on_as_the_saved_one(make, tmp_path):
    model = make()
    train(model, epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert list(loaded.optimizer) == list(model.optimizer)
    for one, other in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    train(model, epochs=2)
    train(loaded, epochs=2)
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_changed_learning_rate_is_saved(tmp_path):
    model = compiled({"encoder": SGD(0.1), "head": SGD(0.1)})
    train(model)
    model.optimizer["head"].learning_rate = 0.025
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    close([float(loaded.optimizer[name].learning_rate.numpy()) for name in loaded.optimizer], [0.1, 0.025])


def test_the_config_makes_the_same_optimizers():
    optimizers = hl.optimizers.NamedOptimizers({"encoder": SGD(0.1, momentum=0.5), "*": "adam"}, name="ours")
    again = hl.optimizers.NamedOptimizers.from_config(optimizers.get_config())
    assert again.name == "ours"
    assert list(again) == ["encoder", "*"]
    assert again["encoder"].momentum == 0.5
    assert again.get_config() == optimizers.get_config()
