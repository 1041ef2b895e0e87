"""PyTorch: layers as modules of torch, modules of torch as layers, where a step is traced."""

import re

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from keras.src.backend.torch.layer import TorchLayer

import handloom as hl
from handloom.backends.torch import modules as ours


def ones(*shape):
    return np.ones(shape, "float32")


def close(actual, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=1e-6)


# ---------------------------------------------------------- layers as modules of torch


class Net(hl.Model):
    """Built at its first call, layer by layer."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.Sequential([layers.Dense(3), layers.BatchNormalization()]), layers.Dense(1)

    def call(self, x, training=False):
        return self.out(self.hidden(x, training=training))


def by_fit(model):
    model.compile("sgd", "mse")
    model.fit(ones(8, 2), ones(8, 1), verbose=0)


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
def test_the_state_dict_has_the_weights_of_a_model_however_it_was_built(build):
    build(model := Net())
    by_keras(other := Net())
    assert parameters_of(model) == parameters_of(other)


def test_a_state_dict_follows_training_and_is_loaded_back():
    model = Net()
    by_fit(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.predict(ones(2, 2), verbose=0)
    by_fit(model)
    kernel = f"_torch_params.{model.out.kernel.path}"
    close(model.state_dict()[kernel], ops.convert_to_numpy(model.out.kernel))
    assert not torch.equal(before[kernel], model.state_dict()[kernel])
    model.load_state_dict(before)
    np.testing.assert_array_equal(model.predict(ones(2, 2), verbose=0), expected)


def test_what_a_failed_trace_built_has_its_parameters():
    model = Net()

    def step(x):
        model(x)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        hl.function(step)(ones(8, 2))
    assert parameters_of(model)


def test_how_keras_makes_parameters_is_put_back():
    original = TorchLayer._post_build
    with ours.parameters_made():
        assert TorchLayer._post_build is not original
    assert TorchLayer._post_build is original


def test_keras_alone_makes_no_parameters_in_a_scope():
    layer = layers.Dense(1)
    with keras.StatelessScope(initialize_variables=True):
        layer.build((None, 2))
    assert not layer.state_dict()


# ---------------------------------------------------------- modules of torch as layers


def test_a_module_of_torchs_is_trained_in_a_step(eagerly):
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


def test_the_call_of_a_module_is_put_back():
    original = layers.TorchModuleWrapper.call
    with ours.modules_read_variables:
        assert layers.TorchModuleWrapper.call is not original
    assert layers.TorchModuleWrapper.call is original
