"""Owners of variables in `NamedOptimizers` over the life of a model: shared, renamed, frozen, unfrozen and loaded."""

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom.errors import OptimizerError
from tests.models import compiled, fit
from tests.numbers import close, each_close, each_same, normal, same_values

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
X = normal(16, 2)
Y = X @ np.array([[1.0], [-2.0]], "float32")


@keras.saving.register_keras_serializable("ownership")
class Stack(hl.Model):
    """Layers without names of their own, one after the other."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.second, self.last = layers.Dense(2), layers.Dense(2), layers.Dense(1)

    def call(self, x):
        return self.last(self.second(self.first(x)))


def made(optimizer=None, cls=Stack):
    model = cls()
    model(X)
    return model if optimizer is None else compiled(model, optimizer)


def train(model, batch_size=8):
    return fit(model, X, Y, batch_size=batch_size)


def owned(model):
    """For each name, the positions of its variables among all weights."""
    places = {id(variable): place for place, variable in enumerate(model.weights)}
    return {name: [places[id(v)] for v in variables] for name, variables in model.optimizer.owners().items()}


def stay(before, after):
    return [np.array_equal(*pair) for pair in zip(before, after, strict=True)]


def reloaded(model, path):
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


# ---------------------------------------------------------------------- shared and renamed


class Tied(hl.Model):
    """Two parts with a layer in common."""

    def __init__(self):
        super().__init__()
        self.common = layers.Dense(2, name="common")
        self.left = keras.Sequential([self.common, layers.Dense(1, name="left")])
        self.right = keras.Sequential([self.common, layers.Dense(1, name="right")])

    def call(self, x):
        return self.left(x) - self.right(x)


def test_named_optimizers_with_a_layer_in_two_parts_refuse_two_owners_and_take_one(eagerly):
    with pytest.raises(OptimizerError, match=r"common/kernel' is owned twice, by the optimizers 'left' and 'right'"):
        made({"left": SGD(0.1), "right": SGD(0.1)}, Tied)
    model = made({"common": SGD(0.0), "*": SGD(0.1)}, Tied)
    before = model.common.get_weights()
    train(model)
    assert owned(model) == {"common": [0, 1], "*": [2, 3, 4, 5]}
    each_same(model.common.get_weights(), before)


def test_named_optimizers_with_a_layer_called_twice_move_it_once_by_both_gradients(eagerly):
    layer, inputs = layers.Dense(2, use_bias=False, kernel_initializer="identity"), keras.Input((2,))
    model = compiled(hl.Model(inputs, layer(layer(inputs))), {"layers": SGD(0.1)})
    fit(model, X, 3 * X, batch_size=16)
    of_each_call = X.T @ (2 * (X - 3 * X) / X.size)
    close(model.get_weights()[0], np.eye(2) - 0.1 * 2 * of_each_call, rtol=1e-4)
    assert int(model.optimizer["layers"].iterations) == 1


def test_owners_follow_an_attribute_to_another_layer_and_miss_a_deleted_one():
    model = made()
    model.chosen = [model.first]
    compiled(model, {"chosen": SGD(0.1), "*": SGD(0.0)})
    assert owned(model)["chosen"] == [0, 1]
    model.chosen = [model.last]
    before = model.get_weights()
    train(model)
    assert owned(model)["chosen"] == [4, 5]
    assert stay(before, model.get_weights()) == [True] * 4 + [False] * 2
    del model.chosen
    with pytest.raises(OptimizerError, match=r"for 'chosen', but Stack has no attribute 'chosen'"):
        model.optimizer.owners()


# ---------------------------------------------------------------------- predicates, saved


def test_owners_by_a_predicate_are_the_same_after_loading_with_other_paths(tmp_path):
    model = made()
    path = model.second.path
    compiled(model, {"chosen": (lambda of: of.startswith(path), Adam(0.01)), "*": SGD(0.1, momentum=0.9)})
    train(model)
    loaded = reloaded(model, tmp_path)
    assert [v.path for v in loaded.weights] != [v.path for v in model.weights]
    assert owned(loaded) == owned(model) == {"chosen": [2, 3], "*": [0, 1, 4, 5]}
    for either in (model, loaded):
        train(either)
    same_values([model, model.optimizer], [loaded, loaded.optimizer])


def test_owners_by_a_predicate_are_saved_twice_also_while_they_are_frozen(tmp_path):
    model = made({"biases": (lambda path: path.endswith("bias"), SGD(0.1)), "*": SGD(0.1)})
    model.first.trainable = False
    assert owned(model) == {"biases": [3, 5], "*": [2, 4]}
    loaded = reloaded(reloaded(model, tmp_path), tmp_path)
    loaded.first.trainable = True
    assert owned(loaded) == {"biases": [1, 3, 5], "*": [0, 2, 4]}


# ---------------------------------------------------------------------- frozen and unfrozen


def test_named_optimizers_continue_an_unfrozen_part_with_the_momentum_that_it_had():
    model = made({"last": SGD(0.1, momentum=0.5), "*": SGD(0.0)})
    hidden = X @ model.first.get_weights()[0] @ model.second.get_weights()[0]
    weights, moves = model.last.get_weights(), [0.0, 0.0]
    for frozen in (False, True, False):
        model.last.trainable = not frozen
        train(model, batch_size=16)
        if not frozen:
            slope = 2 * (hidden @ weights[0] + weights[1] - Y) / len(X)
            gradients = hidden.T @ slope, slope.sum(axis=0)
            moves = [0.5 * move - 0.1 * gradient for move, gradient in zip(moves, gradients, strict=True)]
            weights = [weight + move for weight, move in zip(weights, moves, strict=True)]
        each_close(model.last.get_weights(), weights, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.01)], ids=["SGD", "Adam"])
def test_named_optimizers_own_a_part_frozen_at_first_with_slots_once_it_is_unfrozen(optimizer):
    model = made()
    model.first.trainable = False
    compiled(model, {"first": optimizer(), "*": optimizer()})
    before = model.first.get_weights()
    train(model)
    assert owned(model) == {"first": [], "*": [2, 3, 4, 5]}
    each_same(model.first.get_weights(), before)
    model.first.trainable = True
    train(model)
    assert owned(model) == {"first": [0, 1], "*": [2, 3, 4, 5]}
    assert not any(stay(before, model.first.get_weights()))
    of_two, of_four = (len(model.optimizer[name].variables) - 2 for name in ("first", "*"))
    assert 2 * of_two == of_four > 0
    assert [int(model.optimizer[name].iterations) for name in ("first", "*")] == [2, 4]
