"""Who owns a variable, over the life of a model: renamed, shared, frozen, thawed, saved and loaded."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import OptimizerError

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(16, 2)).astype("float32")
Y = (X @ [[1.0], [-2.0]]).astype("float32")


@keras.saving.register_keras_serializable("ownership")
class Stack(hl.Model):
    """Layers without names of their own, one after the other."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.second, self.last = layers.Dense(2), layers.Dense(2), layers.Dense(1)
        self.parts = {"front": [self.first], "back": (self.second, [self.last])}

    def call(self, x):
        return self.last(self.second(self.first(x)))


def stack(optimizer):
    model = Stack()
    model(X)
    model.compile(optimizer, "mse")
    return model


def train(model, **options):
    return model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, **options)


def owned(model):
    """For each name the numbers, among all weights, of those it owns."""
    places = {id(variable): place for place, variable in enumerate(model.weights)}
    return {name: [places[id(v)] for v in variables] for name, variables in model.optimizer.owners().items()}


def values(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def still(before, after):
    return [np.array_equal(*pair) for pair in zip(before, after, strict=True)]


# ---------------------------------------------------------------------- what a name stands for


def test_a_name_may_be_lists_and_layers_at_any_depth():
    model = stack({"parts": SGD(0.1)})
    assert sorted(owned(model)["parts"]) == [0, 1, 2, 3, 4, 5]


def test_a_predicate_chooses_by_path_and_its_name_is_free():
    model = stack({"biases": (lambda path: path.endswith("bias"), SGD(0.1)), "*": SGD(0.0)})
    before = model.get_weights()
    train(model)
    assert owned(model) == {"biases": [1, 3, 5], "*": [0, 2, 4]}
    assert still(before, model.get_weights()) == 3 * [True, False]


def test_a_predicate_and_a_name_that_own_the_same_are_both_named():
    with pytest.raises(OptimizerError, match=r"kernel' is owned twice, by the optimizers 'first' and 'kernels'"):
        stack({"first": SGD(0.1), "kernels": (lambda path: path.endswith("kernel"), SGD(0.1)), "*": SGD(0.1)})


class Tied(hl.Model):
    """Two parts with a layer in common."""

    def __init__(self):
        super().__init__()
        self.common = layers.Dense(2, name="common")
        self.left = keras.Sequential([self.common, layers.Dense(1, name="left")])
        self.right = keras.Sequential([self.common, layers.Dense(1, name="right")])

    def call(self, x):
        return self.left(x) - self.right(x)


def tied(optimizer):
    model = Tied()
    model(X)
    model.compile(optimizer, "mse")
    return model


def test_a_layer_in_two_parts_is_owned_twice_and_the_error_names_both():
    with pytest.raises(OptimizerError, match=r"common/kernel' is owned twice, by the optimizers 'left' and 'right'"):
        tied({"left": SGD(0.1), "right": SGD(0.1)})


def test_a_layer_in_two_parts_may_have_an_optimizer_of_its_own(eagerly):
    model = tied({"common": SGD(0.0), "*": SGD(0.1)})
    before = model.common.get_weights()
    train(model)
    assert owned(model) == {"common": [0, 1], "*": [2, 3, 4, 5]}
    assert still(before, model.common.get_weights()) == [True, True]


def test_a_layer_that_is_called_twice_is_moved_once_by_both_gradients(eagerly):
    layer = layers.Dense(2, use_bias=False, kernel_initializer="identity")
    inputs = keras.Input((2,))
    model = hl.Model(inputs, layer(layer(inputs)))
    model.compile({"layers": SGD(0.1)}, "mse")
    model.fit(X, 3 * X, batch_size=16, verbose=0)
    of_each_call = X.T @ (2 * (X - 3 * X) / X.size)
    np.testing.assert_allclose(model.get_weights()[0], np.eye(2) - 0.1 * 2 * of_each_call, rtol=1e-4)
    assert int(model.optimizer["layers"].iterations) == 1


# ---------------------------------------------------------------------- names that change


def test_a_name_that_the_model_no_longer_has_is_missed():
    model = stack({"second": SGD(0.1), "*": SGD(0.1)})
    train(model)
    model.middle = model.second
    del model.second
    with pytest.raises(OptimizerError, match=r"for 'second', but Stack has no such attribute"):
        model.optimizer.owners()


def test_a_name_follows_the_attribute_to_another_layer():
    model = Stack()
    model(X)
    model.chosen = [model.first]
    model.compile({"chosen": SGD(0.1), "*": SGD(0.0)}, "mse")
    assert owned(model)["chosen"] == [0, 1]
    model.chosen = [model.last]
    before = model.get_weights()
    train(model)
    assert owned(model)["chosen"] == [4, 5]
    assert still(before, model.get_weights()) == [True] * 4 + [False] * 2


@pytest.mark.parametrize("slots", [lambda: SGD(0.05, momentum=0.9), lambda: Adam(0.01)], ids=["SGD", "Adam"])
def test_what_a_predicate_chose_is_owned_after_loading_though_the_paths_are_others(slots, tmp_path):
    model = Stack()
    model(X)
    path = model.second.path
    model.compile({"chosen": (lambda of: of.startswith(path), slots()), "*": SGD(0.1, momentum=0.9)}, "mse")
    train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.weights] != [v.path for v in model.weights]
    assert owned(loaded) == owned(model) == {"chosen": [2, 3], "*": [0, 1, 4, 5]}
    for either in (model, loaded):
        train(either)
    assert all(still(model.get_weights(), loaded.get_weights()))
    assert all(still(values(model.optimizer.variables), values(loaded.optimizer.variables)))


def test_what_a_predicate_chose_is_saved_a_second_time(tmp_path):
    model = stack({"biases": (lambda path: path.endswith("bias"), SGD(0.1)), "*": SGD(0.1)})
    for name in ("once.keras", "twice.keras"):
        model.save(tmp_path / name)
        model = keras.saving.load_model(tmp_path / name)
    assert owned(model) == {"biases": [1, 3, 5], "*": [0, 2, 4]}


def test_what_a_predicate_chose_is_saved_though_it_is_frozen(tmp_path):
    model = stack({"biases": (lambda path: path.endswith("bias"), SGD(0.1)), "*": SGD(0.1)})
    model.first.trainable = False
    assert owned(model) == {"biases": [3, 5], "*": [2, 4]}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.first.trainable = True
    assert owned(loaded) == {"biases": [1, 3, 5], "*": [0, 2, 4]}


# ---------------------------------------------------------------------- frozen and thawed


def test_what_is_frozen_is_not_moved_by_momentum_or_decay_and_goes_on_where_it_was(eagerly):
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.5)
    model = stack({"first": optimizer, "*": SGD(0.1)})
    train(model)
    model.first.trainable = False
    before = model.first.get_weights(), values(optimizer.variables)
    train(model)
    assert all(still(before[0], model.first.get_weights()))
    assert all(still(before[1], values(optimizer.variables)))
    model.first.trainable = True
    train(model)
    assert not any(still(before[0], model.first.get_weights()))
    assert int(optimizer.iterations) == 2 * 2


def test_a_thawed_part_has_the_momentum_that_it_had():
    model = Stack()
    model(X)
    model.compile({"last": SGD(0.1, momentum=0.5), "*": SGD(0.0)}, "mse")
    hidden = X @ model.first.get_weights()[0] @ model.second.get_weights()[0]
    kernel, bias = model.last.get_weights()
    moved = [0.0, 0.0]
    for frozen in (False, True, False):
        model.last.trainable = not frozen
        model.fit(X, Y, batch_size=16, verbose=0)
        if not frozen:
            slope = 2 * (hidden @ kernel + bias - Y) / len(X)
            gradients = hidden.T @ slope, slope.sum(axis=0)
            moved = [0.5 * velocity - 0.1 * gradient for velocity, gradient in zip(moved, gradients, strict=True)]
            kernel, bias = kernel + moved[0], bias + moved[1]
        np.testing.assert_allclose(model.last.get_weights()[0], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.last.get_weights()[1], bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.01)], ids=["SGD", "Adam"])
def test_a_part_frozen_before_the_first_step_is_owned_with_slots_once_it_is_thawed(optimizer):
    model = Stack()
    model(X)
    model.first.trainable = False
    model.compile({"first": optimizer(), "*": optimizer()}, "mse")
    before = model.first.get_weights()
    train(model)
    assert owned(model) == {"first": [], "*": [2, 3, 4, 5]}
    assert all(still(before, model.first.get_weights()))
    model.first.trainable = True
    train(model)
    assert owned(model) == {"first": [0, 1], "*": [2, 3, 4, 5]}
    assert not any(still(before, model.first.get_weights()))
    of_two, of_four = (len(model.optimizer[name].variables) - 2 for name in ("first", "*"))
    assert 2 * of_two == of_four > 0
    assert [int(model.optimizer[name].iterations) for name in ("first", "*")] == [2, 4]
