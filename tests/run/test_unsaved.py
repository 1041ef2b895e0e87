"""`fit` with a `run_dir` refuses a step whose state no checkpoint can hold; without one, it trains."""

import re

import keras
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.errors import StepError
from tests.numbers import ones

tf = pytest.importorskip("tensorflow") if backend.name == "tensorflow" else None
torch = pytest.importorskip("torch") if backend.name == "torch" else None

on_tensorflow, on_torch = pytest.mark.backend("tensorflow"), pytest.mark.backend("torch")


def counting_in_tensorflow():
    count = tf.Variable(0.0, name="count")
    return lambda x: x + count.assign_add(1.0)


def generator_of_tensorflow():
    generator = tf.random.Generator.from_seed(1)
    return lambda x: x + generator.normal(tf.shape(x))


def randomness_in_a_branch():
    return lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: tf.random.uniform(tf.shape(x)), lambda: x)


def module_of_torch():
    return torch.nn.BatchNorm1d(3)


def module_of_torch_in_a_layer():
    return layers.TorchModuleWrapper(torch.nn.BatchNorm1d(3))


def generator_of_torch():
    generator = torch.Generator().manual_seed(0)
    return lambda x: x + torch.rand(x.shape, generator=generator)


REFUSED = [
    pytest.param(counting_in_tensorflow, "the tf.Variable 'count:0'", marks=on_tensorflow),
    pytest.param(generator_of_tensorflow, "the tf.Variable 'StateVar:0'", marks=on_tensorflow),
    pytest.param(lambda: lambda x: x + tf.random.normal(tf.shape(x)), "tf.random (the operation", marks=on_tensorflow),
    pytest.param(randomness_in_a_branch, "tf.random (the operation RandomUniform)", marks=on_tensorflow),
    pytest.param(module_of_torch, "modules, optimizers or tensors of torch", marks=on_torch),
    pytest.param(module_of_torch_in_a_layer, "modules, optimizers or tensors of torch", marks=on_torch),
    pytest.param(generator_of_torch, "a torch.Generator", marks=on_torch),
]

SAVED = [
    pytest.param(lambda: lambda x: x + tf.random.get_global_generator().normal(tf.shape(x)), marks=on_tensorflow),
    pytest.param(lambda: lambda x: x + tf.random.stateless_normal(tf.shape(x), [1, 2]), marks=on_tensorflow),
    pytest.param(lambda: lambda x: x + torch.rand(x.shape), marks=on_torch),
]


def fit(make, **options):
    model, change = keras.Sequential([keras.Input((3,)), layers.Dense(1)]), make()
    optimizer = keras.optimizers.SGD(0.1)

    def train_step(x):
        return {"loss": hl.minimize(lambda: ops.mean(model(change(x)) ** 2), model, optimizer)}

    return hl.fit(train_step, ones(8, 3), state={"model": model, "optimizer": optimizer}, verbose=0, **options)


@pytest.mark.filterwarnings("ignore:.*falls back to eager execution")
@pytest.mark.parametrize(("make", "named"), REFUSED)
def test_fit_refuses_to_save_a_step_with_a_state_that_no_checkpoint_holds(make, named, tmp_path):
    fit(make)
    with pytest.raises(StepError, match=f"{re.escape(named)}.*, which a checkpoint cannot hold"):
        fit(make, run_dir=tmp_path)
    fit(make, run_dir=tmp_path / "unsaved", save=None)


@pytest.mark.parametrize("make", SAVED)
def test_fit_saves_a_step_with_randomness_that_checkpoints_hold(make, tmp_path):
    assert fit(make, run_dir=tmp_path).epoch == [0]
