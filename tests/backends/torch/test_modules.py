"""PyTorch: layers as modules of torch, and modules of torch as layers, in a trace."""

import re

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import handloom as hl
from tests.models import compiled, fit, subclassed
from tests.numbers import close, ones, same

# ---------------------------------------------------------- layers as modules of torch


def net():
    """Built at its first call, layer by layer."""
    return subclassed(layers.Dense(3), layers.BatchNormalization(), layers.Dense(1), inputs=None)


def by_fit(model):
    fit(compiled(model), ones(8, 2), ones(8, 1))


def by_predict(model):
    model.predict(ones(8, 2), verbose=0)


def by_hand(model):
    optimizer = keras.optimizers.SGD(0.1)
    step = hl.function(lambda x: hl.minimize(lambda: ops.mean(model(x, training=True) ** 2), model, optimizer))
    step(ones(8, 2))


def by_a_gradient(model):
    hl.grad(lambda x: ops.mean(model(x)))(ones(8, 2))


def by_keras(model):
    model(ones(8, 2))


def parameters_of(model):
    """The state as torch has it, by names without the numbers that Keras counts."""
    state = model.state_dict(keep_vars=True)
    assert {id(tensor) for tensor in state.values()} == {id(variable.value) for variable in model.variables}
    return [re.sub(r"_\d+", "", name) for name in state]


@pytest.mark.parametrize("build", [by_fit, by_predict, by_hand, by_a_gradient])
def test_state_dict_has_the_weights_of_a_model_however_it_was_built(build):
    build(model := net())
    by_keras(other := net())
    assert parameters_of(model) == parameters_of(other)


def test_state_dict_follows_training_and_is_loaded_back():
    model = net()
    by_fit(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.predict(ones(2, 2), verbose=0)
    by_fit(model)
    kernel = f"_torch_params.{model.parts[-1].kernel.path}"
    same(model.state_dict()[kernel], model.parts[-1].kernel)
    assert not torch.equal(before[kernel], model.state_dict()[kernel])
    model.load_state_dict(before)
    same(model.predict(ones(2, 2), verbose=0), expected)


def test_state_dict_has_the_weights_that_a_failed_trace_built():
    model = net()

    def step(x):
        model(x)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        hl.function(step)(ones(8, 2))
    assert parameters_of(model)


def test_keras_makes_no_parameters_in_a_scope():
    layer = layers.Dense(1)
    with keras.StatelessScope(initialize_variables=True):
        layer.build((None, 2))
    assert not layer.state_dict()


# ---------------------------------------------------------- modules of torch as layers


def test_minimize_trains_a_module_of_torch(eagerly):
    module = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    layer = layers.TorchModuleWrapper(module)
    x = ones(1, 3)
    layer(x)
    optimizer = keras.optimizers.SGD(0.5)
    step = hl.function(lambda x: hl.minimize(lambda: ops.sum(layer(x)), layer, optimizer))
    close(step(x), 3)
    close(step(x), 1.5)
    close(module.weight, np.zeros((1, 3)))
