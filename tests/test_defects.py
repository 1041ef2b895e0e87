"""Defects that were fixed, each with the right value, so that none comes back."""

import gc
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.errors import FallbackWarning, OptimizerError
from tests.models import compiled, fit, functional
from tests.numbers import close, normal, ones, same_values

X, Y = normal(24, 3), normal(24, 1, seed=1)


def regressor(cls=hl.Model):
    keras.utils.set_random_seed(0)
    return functional(cls=cls)


# ------------------------------------------------------------------- optimizers


def test_model_minimize_takes_the_weight_of_accumulated_gradients(eagerly):
    class Weighted(hl.Model):
        def train_step(self, data):
            x, y, tokens = data
            loss = self.minimize(lambda: ops.mean((self(x) - y) ** 2), weight=ops.sum(tokens))
            return {"loss": loss}

    class Whole(hl.Model):
        def train_step(self, data):
            x, y, tokens = data
            return {"loss": self.minimize(lambda: ops.sum(tokens * (self(x) - y)[:, 0] ** 2) / ops.sum(tokens))}

    tokens = np.repeat([1.0, 3.0], 12).astype("float32")  # Equal within a batch, so that its mean is the weighted mean.
    batches = [(X[:12], Y[:12], tokens[:12]), (X[12:], Y[12:], tokens[12:])]
    accumulation = hl.optimizers.GradientAccumulation(keras.optimizers.SGD(0.1), 2)
    accumulated, whole = compiled(regressor(Weighted), accumulation), compiled(regressor(Whole))
    accumulated.fit(hl.Feed(lambda: iter(batches)), verbose=0)
    whole.fit(hl.Feed(lambda: iter([(X, Y, tokens)])), verbose=0)
    close(accumulated.get_weights()[0], whole.get_weights()[0])


def test_compile_leaves_the_given_optimizer_as_it_is_and_shares_its_learning_rate():
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)
    before, models = optimizer.get_config(), [compiled(regressor(), optimizer) for _ in range(2)]
    for model in models:  # Both accumulate.
        fit(model, X, Y, batch_size=12)
        assert model.optimizer.steps == 2
    assert optimizer.get_config() == before
    assert not optimizer.built
    whole = compiled(regressor(), keras.optimizers.SGD(0.1, momentum=0.9))
    fit(whole, X, Y, batch_size=24)
    for model in models:
        close(model.get_weights()[0], whole.get_weights()[0])
    optimizer.learning_rate = 0.25
    close(models[0].optimizer.learning_rate, 0.25)
    models[1].optimizer.learning_rate = 0.5
    close(optimizer.learning_rate, 0.5)


def test_compile_refuses_to_copy_an_optimizer_that_has_slots():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer.build(regressor().trainable_variables)
    with pytest.raises(OptimizerError, match=r"gradient_accumulation_steps=2.*HL334"):
        compiled(regressor(), optimizer)


# ---------------------------------------------------------------- memory, sparsity


@pytest.mark.backend("torch")
def test_function_with_inductor_compares_on_one_copy_of_the_state_at_a_time():
    import torch  # noqa: PLC0415

    large = keras.Variable(np.zeros(1 << 20, "float32"))
    alive = []

    def kernels(*values):
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr()
            for tensor in gc.get_objects()
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.numel() >= 1 << 20
        }
        alive.append(len(storages))
        values[0].add_(1)
        return [values[0].sum()]

    def fn(x):
        large.assign(large + x)
        return [ops.sum(large)]

    program = backend.trace(fn, [backend.to_tensor(np.float32(1))], jit_compile="auto")
    assert program._agrees(kernels, [backend.to_tensor(np.float32(1))])
    assert alive == [2]  # The variable and one copy of it.


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("cls", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_fit_keeps_gradients_of_embeddings_sparse_and_right_where_rows_repeat(cls):
    """Adam of Keras squares each looked-up row by itself, which is wrong where a row is looked up twice."""
    kinds = []

    class Table(layers.Layer):
        """An embedding by a product with ones and zeros, which has a dense gradient."""

        def build(self, shape):
            self.embeddings = self.add_weight(shape=(20, 2), initializer="uniform")

        def call(self, x):
            return ops.matmul(ops.one_hot(x, 20), self.embeddings)

    class Noting(cls):
        def apply(self, grads, trainable_variables=None):
            kinds.append(type(grads[0]).__name__)
            super().apply(grads, trainable_variables)

    def model(table, optimizer):
        inputs = keras.Input((3,), dtype="int32")
        return compiled(hl.Model(inputs, layers.Dense(1)(layers.Flatten()(table(inputs)))), optimizer)

    x = np.random.default_rng(0).integers(0, 5, (24, 3))
    dense, sparse = model(Table(), cls(0.1)), model(layers.Embedding(20, 2), Noting(0.1))
    sparse.set_weights(dense.get_weights())
    for each in (dense, sparse):
        fit(each, x, Y, batch_size=8)
    assert set(kinds) == {"IndexedSlices"}
    close(sparse.get_weights()[0], dense.get_weights()[0])


# --------------------------------------------------------- patches and registrations


@pytest.mark.backend("tensorflow")
def test_grad_leaves_variables_of_tensorflow_and_gradients_that_it_may_register_alone():
    code = """
import tensorflow as tf
from tensorflow.python.ops import resource_variable_ops as ops
tf.RegisterGradient("DenseBincount")(lambda op, gradient: [None, None, None])
before = dict(vars(ops.BaseResourceVariable))
import handloom as hl
import keras
v = keras.Variable(3.0)
assert float(hl.grad(lambda: v * v, wrt=v)()) == 6
assert all(vars(ops.BaseResourceVariable)[name] is value for name, value in before.items())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------- devices, fused steps


@pytest.mark.backend("jax")
def test_function_moves_an_array_on_another_device_to_that_of_the_variables():
    code = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, keras, numpy as np
import handloom as hl
v = keras.Variable(2.0)

@hl.function
def step(x):
    v.assign(v + 1)
    return x * v

first, other = jax.devices()
for x in (jax.device_put(np.ones(3, "float32"), first), jax.device_put(np.ones(3, "float32"), other)):
    assert step(x).devices() == v.value.devices() == {first}
assert len(step.traces) == 1

double = hl.function(lambda x: x * 2)
spread = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), "d"), jax.sharding.PartitionSpec("d"))
assert double(np.ones(4, "float32")).devices() == {first}
assert double(jax.device_put(np.ones(4, "float32"), spread)).devices() == {first, other}
assert len(double.traces) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.backend("torch")
def test_function_converts_a_tensor_on_another_device_again():
    import torch  # noqa: PLC0415

    double = hl.function(lambda x: x * 2)
    close(double(torch.ones(3)), 2 * ones(3))
    with pytest.raises(NotImplementedError, match="meta"):  # It cannot be moved, which is an error.
        double(torch.ones(3, device="meta"))


@pytest.mark.backend("tensorflow")
def test_fit_takes_steps_that_cannot_be_fused_one_by_one_with_a_warning():
    import tensorflow as tf  # noqa: PLC0415

    total = keras.Variable(0.0)

    def step(x):
        total.assign(total + tf.reduce_sum(x.values))
        return {"total": total.value * 1}

    batches = [tf.ragged.constant([[1.0], [2.0, 3.0]])] * 4
    with pytest.warns(FallbackWarning, match="2 steps of .* cannot run in one dispatch.*no common shape") as warned:
        hl.fit(step, lambda: iter(batches), steps_per_execution=2, verbose=0)
    assert len(warned) == 1
    close(total, 24)


# ------------------------------------------------------------------- arguments and models


def test_fit_leaves_the_arrays_of_the_user_when_a_step_changes_its_arguments_in_place():
    data = ones(8, 2)

    def step(x):
        x += 1  # On PyTorch, in place.
        return {"mean": ops.mean(x)}

    assert hl.fit(step, hl.Feed(data, batch_size=4), epochs=2, verbose=0).history["mean"] == [2, 2]
    close(data, ones(8, 2))


def test_train_on_batch_of_two_models_in_turn_trains_each_as_alone():
    def trained(steps):
        models = [compiled(regressor(), "adam") for _ in range(2)]
        for index in steps:
            models[index].train_on_batch(X, Y)
        return models

    same_values(trained([0, 1, 0, 1]), trained([0, 0, 1, 1]))
