"""`named` names variables by their place, the same in each process and on each backend."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import AddNoise, GradientAccumulation, GradientTransforms, WeightAveraging
from tests.models import built, compiled, fit, functional, sequential
from tests.numbers import ones

X, Y = ones(4, 3), ones(4, 2)


def names(state):
    return list(named(state)[0])


def with_dropout():
    model = compiled(functional(layers.Dense(2), layers.Dropout(0.5)), "adam", metrics=["mae"])
    fit(model, X, Y)
    return model


class Parts(hl.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(4), layers.Dense(2)]
        self.attention = layers.MultiHeadAttention(1, 2)
        self.norm, self.seed = layers.BatchNormalization(), keras.random.SeedGenerator(0)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(self.attention(x[:, None], x[:, None])[:, 0])


@pytest.fixture
def wrapped():
    """A trained model whose optimizer is inside two others."""
    model = compiled(Parts(), {"*": GradientAccumulation(WeightAveraging("adam"), 2)}, metrics=["mae"])
    fit(model, X, Y)
    return model


def test_named_finds_the_parts_of_a_functional_model_and_the_slots_of_its_optimizer():
    expected = [
        "model.compile_metrics.flat_metrics[0].metrics[0].count",
        "model.compile_metrics.flat_metrics[0].metrics[0].total",
        "model.loss_tracker.count",
        "model.loss_tracker.total",
        "model.layers[1].bias",
        "model.layers[1].kernel",
        "model.layers[2].seed_generator.state",
        "model.optimizer.iterations",
        "model.optimizer.learning_rate",
        *(
            f"model.optimizer.{slot}[model.layers[1].{weight}]"
            for slot in ("momentums", "velocities")
            for weight in ("kernel", "bias")
        ),
    ]
    assert names({"model": with_dropout()}) == expected
    assert names({"model": with_dropout()}) == expected  # Keras calls these layers dense_1 and dropout_1.


def test_named_calls_slots_after_their_variables(wrapped):
    optimizer, found = wrapped.optimizer["*"], named({"model": wrapped})[0]
    place = [variable.path for variable in wrapped.trainable_variables].index(wrapped.norm.gamma.path)
    name = "model.optimizer.by_name.*"
    assert found[f"{name}.sums[model.norm.gamma]"] is optimizer._sums[place]
    assert found[f"{name}.inner_optimizer.averages[model.norm.gamma]"] is optimizer.inner_optimizer._averages[place]


def test_named_numbers_slots_of_variables_without_a_name():
    layer, optimizer = built(layers.Dense(1)), keras.optimizers.SGD(momentum=0.9)
    optimizer.build(layer.trainable_variables)
    assert names({"optimizer": optimizer})[:2] == ["optimizer.momentums[0]", "optimizer.momentums[1]"]


def test_named_finds_the_parts_of_a_subclassed_model_by_its_attributes():
    model = Parts()
    model(X)
    found = names({"model": model})
    assert {"model.blocks[1].kernel", "model.norm.moving_mean", "model.seed.state"} <= set(found)
    assert {f"model.attention.{part}_dense.kernel" for part in ("query", "key", "value", "output")} <= set(found)
    assert not any("_" in name.split(".")[0] or name.startswith("_") for name in found)


def test_named_finds_every_variable_once(wrapped):
    found = named({"model": wrapped, "again": [wrapped, wrapped.norm]})[0]
    variables = [*wrapped.variables, *wrapped.metrics_variables, *wrapped.optimizer.variables]
    assert {id(variable) for variable in found.values()} == {id(variable) for variable in variables}
    assert len(found) == len(set(map(id, variables)))


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
def test_named_gives_an_optimizer_only_its_own_variables(order):
    model = with_dropout()
    state = {"model": model, "optimizer": model.optimizer}
    found = named({name: state[name] for name in order})[0]
    assert found["model.layers[1].kernel"] is model.layers[1].kernel


def test_named_finds_the_variables_of_a_gradient_transform():
    model = compiled(sequential(layers.Dense(2)), GradientTransforms("sgd", [AddNoise(0.1)]))
    found = named(model.optimizer)[0].values()
    assert {id(variable) for variable in found} == {id(variable) for variable in model.optimizer.variables}
    assert any(variable.name == "seed_generator_state" for variable in found)


def test_named_takes_variables_structures_and_objects_with_a_state():
    feed = hl.Feed(X)
    variables, stateful = named(
        {"a": [keras.Variable(1.0), None, np.ones(1)], "b": {"c": keras.Variable(2.0), "f": feed}}
    )
    assert list(variables) == ["a[0]", "a[2]", "b.c"]
    assert stateful == {"b.f": feed}


def test_named_tells_attributes_apart_that_differ_by_an_underscore():
    layer = layers.Layer()
    layer.kernel, layer._kernel = keras.Variable(1.0), keras.Variable(2.0)
    assert names({"layer": layer}) == ["layer.kernel", "layer.kernel#1"]


@pytest.mark.parametrize("thing", [1, "text", lambda: None])
def test_named_refuses_anything_else_by_its_place(thing):
    with pytest.raises(TypeError, match=r"nets\.one is of type .*, which has no state that can be saved\. Pass models"):
        named({"nets": {"one": thing}})
