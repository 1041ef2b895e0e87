"""Variables are named by where they stand: alike in each process, on each backend, whatever Keras calls them."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import AddNoise, GradientAccumulation, GradientTransforms, WeightAveraging

X, Y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")


def names(state):
    return list(named(state)[0])


def functional():
    inputs = keras.Input((3,))
    model = hl.Model(inputs, layers.Dropout(0.5)(layers.Dense(2)(inputs)))
    model.compile("adam", loss="mse", metrics=["mae"])
    model.fit(X, Y, verbose=0)
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


def test_a_functional_models_parts_have_their_places_and_an_optimizers_its_own():
    assert names({"model": functional()}) == [
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


def test_slots_have_the_names_of_what_they_are_for():
    model = Parts()
    model.compile({"*": GradientAccumulation(WeightAveraging("adam"), 2)}, loss="mse")
    model.fit(X, Y, verbose=0)
    optimizer, found = model.optimizer["*"], named({"model": model})[0]
    place = [variable.path for variable in model.trainable_variables].index(model.norm.gamma.path)
    name = "model.optimizer.by_name.*"
    assert found[f"{name}.sums[model.norm.gamma]"] is optimizer._sums[place]
    assert found[f"{name}.inner_optimizer.averages[model.norm.gamma]"] is optimizer.inner_optimizer._averages[place]


def test_slots_of_what_is_named_nowhere_have_their_place():
    layer, optimizer = layers.Dense(1), keras.optimizers.SGD(momentum=0.9)
    layer.build((None, 1))
    optimizer.build(layer.trainable_variables)
    assert names({"optimizer": optimizer})[:2] == ["optimizer.momentums[0]", "optimizer.momentums[1]"]


def test_a_subclassed_models_parts_have_the_names_of_its_attributes():
    model = Parts()
    model(X)
    found = names({"model": model})
    assert {"model.blocks[1].kernel", "model.norm.moving_mean", "model.seed.state"} <= set(found)
    assert {f"model.attention.{part}_dense.kernel" for part in ("query", "key", "value", "output")} <= set(found)
    assert not any("_" in name.split(".")[0] or name.startswith("_") for name in found)


def test_names_do_not_depend_on_what_was_made_before():
    first = names(functional())
    assert names(functional()) == first  # Keras numbers its layers on: dense_1, dropout_1.


def test_every_variable_is_found_once():
    model = Parts()
    model.compile({"*": GradientAccumulation(WeightAveraging("adam"), 2)}, loss="mse", metrics=["mae"])
    model.fit(X, Y, verbose=0)
    found = named({"model": model, "again": [model, model.norm]})[0]
    expected = {id(variable) for variable in [*model.variables, *model.metrics_variables, *model.optimizer.variables]}
    assert {id(variable) for variable in found.values()} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
def test_an_optimizer_does_not_claim_what_it_trains(order):
    model = functional()
    state = {"model": model, "optimizer": model.optimizer}
    found = named({name: state[name] for name in order})[0]
    assert found["model.layers[1].kernel"] is model.layers[1].kernel


def test_what_a_gradient_transform_keeps_is_found():
    model = hl.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(GradientTransforms("sgd", [AddNoise(0.1)]), loss="mse")
    found = named(model.optimizer)[0].values()
    assert {id(variable) for variable in found} == {id(variable) for variable in model.optimizer.variables}
    assert any(variable.name == "seed_generator_state" for variable in found)


def test_bare_variables_structures_and_things_with_a_state():
    feed = hl.Feed(X)
    variables, stateful = named({"a": [keras.Variable(1.0), None], "b": {"c": keras.Variable(2.0), "feed": feed}})
    assert list(variables) == ["a[0]", "b.c"]
    assert stateful == {"b.feed": feed}


@pytest.mark.parametrize("thing", [1, "text", lambda: None])
def test_what_has_no_state_is_an_error_that_says_where_it_is(thing):
    with pytest.raises(TypeError, match=r"nets\.one is of type .*, of which no state can be saved. Pass models"):
        named({"nets": {"one": thing}})
