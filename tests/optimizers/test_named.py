"""`NamedOptimizers`: several optimizers of one model, by the names of the parts that they train."""

import keras
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import OptimizerError
from handloom.optimizers import SAM, LossScaleOptimizer, NamedOptimizers
from tests.models import compiled, fit, sequential
from tests.numbers import close, each_close, normal, numpy, same_values

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
X, Y = normal(4, 2), normal(4, 1, seed=1)


@keras.saving.register_keras_serializable("tests")
class Two(hl.Model):
    """An encoder and a head."""

    def __init__(self, **options):
        super().__init__(**options)
        self.encoder, self.head = layers.Dense(2, name="encoder"), layers.Dense(1, name="head")

    def call(self, x):
        return self.head(self.encoder(x))


def two(optimizer=None, cls=Two):
    keras.utils.set_random_seed(0)
    model = cls()
    model(X)
    return model if optimizer is None else compiled(model, optimizer)


def functional_two(optimizer):
    model = sequential(layers.Dense(2), layers.Dense(1), inputs=2, cls=hl.Model)
    model.encoder, model.head = model.layers
    return compiled(model, optimizer)


def train(model, epochs=1, **options):
    return fit(model, X, Y, epochs=epochs, **options)


def moved(model, change=train):
    """Which weights a change moves: those of the encoder, and those of the head."""
    before = model.get_weights()
    change(model)
    return [bool((now != then).any()) for now, then in zip(model.get_weights(), before, strict=True)]


def paths(variables):
    return [variable.path.split("/", 1)[1] for variable in variables]


def pull(part):
    return lambda model: model.minimize(lambda: ops.sum(model(X)), wrt=part(model))


# ---------------------------------------------------------------------- owners


NAMES = {
    "the rest": (lambda: {"head": SGD(0.0), "*": SGD(0.1)}, [True, True, False, False]),
    "everything": (lambda: {"*": SGD(0.1)}, [True] * 4),
    "an empty rest": (lambda: {"encoder": SGD(0.1), "head": SGD(0.1), "*": SGD(0.1)}, [True] * 4),
    "a dotted path": (lambda: {"encoder.kernel": SGD(0.1), "*": SGD(0.0)}, [True, False, False, False]),
    "an object": (lambda: NamedOptimizers({"encoder": SGD(0.1), "head": SGD(0.0)}), [True, True, False, False]),
    "a predicate": (lambda: {"any": (lambda path: "bias" in path, SGD(0.1)), "*": SGD(0.0)}, [False, True] * 2),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [two, functional_two])
def test_named_optimizers_move_the_variables_of_their_names(name, model):
    make, expected = NAMES[name]
    assert moved(model(make())) == expected


def test_named_optimizers_own_lists_of_layers_at_any_depth_and_bare_variables():
    class Blocks(hl.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(2, name="first"), layers.Dense(2, name="second")
            self.blocks = {"front": [self.first], "back": (self.second,)}
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, x):
            return ops.sum(self.second(self.first(x)), axis=-1, keepdims=True) * self.scale

    model = two({"blocks": SGD(0.0), "scale": SGD(0.1)}, Blocks)
    owners = model.optimizer.owners()
    assert sorted(paths(owners["blocks"])) == ["first/bias", "first/kernel", "second/bias", "second/kernel"]
    assert paths(owners["scale"]) == ["scale"]
    train(model)
    assert float(numpy(model.scale)) != 1


def test_named_optimizers_have_slots_for_their_own_variables_also_when_the_first_batch_builds_the_model():
    for model in (Two(), two()):
        compiled(model, {"encoder": SGD(0.1, momentum=0.9), "head": "adam"})
        train(model, epochs=2)
        assert [len(part.variables) for part in model.optimizer.values()] == [2 + 2, 2 + 4]
        assert int(model.optimizer["head"].iterations) == int(model.optimizer.iterations) == 2


def test_compile_takes_the_config_of_an_optimizer_as_one_optimizer():
    model = two(keras.optimizers.serialize(SGD(0.25)))
    assert isinstance(model.optimizer, SGD)
    close(model.optimizer.learning_rate, 0.25)


def test_minimize_with_named_optimizers_moves_a_part_and_builds_its_owner():
    model = two({"encoder": SGD(0.1, momentum=0.9), "head": SGD(0.1)})
    assert moved(model, pull(lambda model: model.head)) == [False, False, True, True]
    assert moved(model, pull(lambda model: model.encoder.bias)) == [False, True, False, False]
    assert moved(model, pull(lambda model: model.encoder.kernel)) == [True, False, False, False]
    assert [int(part.iterations) for part in model.optimizer.values()] == [2, 1]
    assert len(model.optimizer["encoder"].variables) == 2 + 2


def test_named_optimizers_apply_gradients_to_their_owners():
    model = two({"encoder": SGD(0.1), "head": SGD(0.2)})
    before, variables = model.get_weights(), model.trainable_variables
    model.optimizer.apply([ops.ones(variable.shape) for variable in reversed(variables)], variables[::-1])
    each_close(model.get_weights(), [then - rate for then, rate in zip(before, [0.1, 0.1, 0.2, 0.2], strict=True)])


# ---------------------------------------------------------------------- mistakes

MISTAKES = {
    "without an owner": (
        {"encoder": "sgd"},
        r"No optimizer owns '.*head/kernel', '.*head/bias'.*'encoder'.*\"\*\".*HL319",
    ),
    "owned twice": (
        {"encoder": "sgd", "encoder.kernel": "sgd", "*": "sgd"},
        r"encoder/kernel' is owned twice, by the optimizers 'encoder' and 'encoder\.kernel'.*HL318",
    ),
    "owned by a predicate too": (
        {"encoder": "sgd", "kernels": (lambda path: path.endswith("kernel"), "sgd"), "*": "sgd"},
        "encoder/kernel' is owned twice, by the optimizers 'encoder' and 'kernels'",
    ),
    "no attribute": (
        {"decoder": "sgd", "*": "sgd"},
        r"for 'decoder', but Two has no attribute 'decoder'.*\"encoder\.head\".*lambda path: 'decoder' in path.*HL323",
    ),
    "no attribute in a part": (
        {"encoder.core": "sgd", "*": "sgd"},
        "'encoder.core', but Dense has no attribute 'core'",
    ),
    "not a layer": ({"name": "sgd", "*": "sgd"}, r"for 'name', but Two has 'two' there.*Name a layer.*HL324"),
    "unknown to Keras": ({"encoder": "sdg", "*": "sgd"}, r"optimizer=\{'encoder': 'sdg'\}.*HL322"),
    "not an optimizer": ({"encoder": None, "*": "sgd"}, r"\{'encoder': None\} is not a name and an optimizer.*HL325"),
    "not a name": ({3: "sgd"}, r"\{3: 'sgd'\} is not a name"),
    "not a pair": ({"encoder": (1, 2, 3)}, r"is not a name .*a pair \(predicate, optimizer\)"),
    "none": ({}, "There are no optimizers.*HL316"),
    "one that takes gradients": ({"encoder": LossScaleOptimizer(SAM("sgd")), "*": "sgd"}, r"SAM.*whole loss.*HL350"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_named_optimizers_that_do_not_fit_the_model_are_refused(kind):
    optimizers, words = MISTAKES[kind]
    with pytest.raises(OptimizerError, match=words):
        two().compile(optimizers, "mse")


def test_named_optimizers_are_checked_once_the_model_is_built():
    model = compiled(Two(), {"encoder": SGD(0.1)})
    with pytest.raises(OptimizerError, match=r"No optimizer owns '.*head/kernel'"):
        train(model)


def test_minimize_with_named_optimizers_refuses_variables_of_another_model():
    model, other = two({"encoder": SGD(0.1), "head": SGD(0.1)}), layers.Dense(1, name="other")
    with pytest.raises(OptimizerError, match=r"No optimizer owns 'other/kernel'.*optimizer=\.\.\..*HL320"):
        model.minimize(lambda: ops.sum(other(X)), wrt=other)


def test_named_optimizers_without_a_model_or_variables_say_what_they_lack():
    w, optimizers = keras.Variable(1.0), NamedOptimizers({"encoder": "sgd", "head": "sgd"})
    with pytest.raises(OptimizerError, match=r"belong to a model.*compile\(\).*HL317"):
        hl.minimize(lambda: w**2, w, optimizers)
    with pytest.raises(OptimizerError, match=r"variables are missing.*apply\(gradients, variables\).*HL321"):
        optimizers.apply([ops.ones(())])
    with pytest.raises(KeyError, match=r"no optimizer named 'tail'; there are 'encoder', 'head'"):
        optimizers["tail"]
    with pytest.raises(AttributeError, match=r'use optimizer\["encoder"\]\.learning_rate'):
        _ = optimizers.learning_rate


def test_named_optimizers_are_a_mapping():
    encoder, head = SGD(0.1), SGD(0.2)
    optimizers = NamedOptimizers({"encoder": encoder, "head": head})
    assert (optimizers["head"], list(optimizers), len(optimizers)) == (head, ["encoder", "head"], 2)
    assert dict(optimizers.items()) == {"encoder": encoder, "head": head}
    assert list(optimizers.values()) == optimizers.optimizers == [encoder, head]


# ---------------------------------------------------------------------- over a run


def test_named_optimizers_take_new_learning_rates_without_a_new_trace():
    model = two({"encoder": SGD(0.1), "head": SGD(0.1)})
    step = hl.function(lambda x, y: model.train_step((x, y)))
    step(X, Y)
    model.optimizer["encoder"].learning_rate = 0.0
    assert moved(model, lambda model: step(X, Y)) == [False, False, True, True]
    assert len(step.traces) == 1


def test_named_optimizers_need_no_owner_for_a_frozen_part():
    model = two()
    model.encoder.trainable = False
    assert moved(compiled(model, {"head": SGD(0.1)})) == [False, False, True, True]


def weights_before_the_end(model):
    """Trains one epoch; returns the weights before the averages replace them."""
    seen = []
    train(model, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(model.get_weights()))])
    [weights] = seen
    return weights


def test_named_optimizers_with_use_ema_leave_weights_that_were_never_updated():
    class HeadOnly(Two):
        def train_step(self, data):
            x, y = data
            return {"loss": self.minimize(lambda: ops.mean((self(x) - y) ** 2), wrt=self.head)}

    model = two({"encoder": SGD(0.1, use_ema=True), "head": SGD(0.1, use_ema=True)}, HeadOnly)
    model.optimizer.build(model.trainable_variables)
    assert moved(model) == [False, False, True, True]


def test_named_optimizers_with_use_ema_replace_their_weights_at_the_end_also_after_some_are_frozen():
    model = two({"layers": SGD(0.1, use_ema=True, ema_momentum=0.25)})
    first = weights_before_the_end(model)
    model.encoder.trainable = False
    second = weights_before_the_end(model)
    expected = [0.25 * one + 0.75 * other for one, other in zip(first[2:], second[2:], strict=True)]
    each_close(model.get_weights(), [*first[:2], *expected])


def test_named_optimizers_each_scale_the_loss_under_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    model = two({"encoder": SGD(0.1), "head": SGD(0.1)})
    assert {type(part) for part in model.optimizer.values()} == {LossScaleOptimizer}
    # An overflow halves the scale of one optimizer alone.
    assert moved(model, lambda model: train(model, epochs=3))[::2] == [True, True]


# ---------------------------------------------------------------------- saved and loaded


def test_named_optimizers_train_on_bitwise_identically_after_loading(tmp_path):
    model = two({"encoder": SGD(0.1, momentum=0.9), "*": Adam(0.05)})
    train(model, epochs=2)
    model.optimizer["encoder"].learning_rate = 0.025
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    close(loaded.optimizer["encoder"].learning_rate, 0.025)
    assert list(loaded.optimizer) == list(model.optimizer)
    for _ in range(2):
        same_values([loaded, loaded.optimizer], [model, model.optimizer])
        train(model)
        train(loaded)


def test_named_optimizers_are_loaded_from_their_config():
    optimizers = NamedOptimizers({"encoder": SGD(0.1, momentum=0.5), "*": "adam"}, name="ours")
    again = NamedOptimizers.from_config(optimizers.get_config())
    assert (again.name, list(again), again["encoder"].momentum) == ("ours", ["encoder", "*"], 0.5)
    assert again.get_config() == optimizers.get_config()
