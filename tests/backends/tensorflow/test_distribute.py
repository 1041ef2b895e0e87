"""`tf.distribute` strategies with several replicas are refused in words; each replica alone is fine."""

import keras
import pytest
import tensorflow as tf
from keras import layers, ops

import handloom as hl
from handloom.errors import StepError
from tests.forkserver import forkserver
from tests.models import compiled, fit, sequential
from tests.numbers import ones

X = ones(8, 3)


def strategy():
    """A strategy with two replicas, on a CPU in two. Only a process that has not used TensorFlow can divide its CPU."""
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def batch_of(replicas):
    [batch] = replicas.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(X).batch(8))
    return batch


def total(x):
    return ops.sum(x)


def fit_in_the_scope():
    with strategy().scope():
        fit(compiled(sequential()), X, X[:, :1])


def fit_outside_of_the_scope():
    with strategy().scope():
        model = compiled(sequential())
    fit(model, X, X[:, :1])


def fit_eagerly_in_the_scope():
    with hl.run_eagerly(True):
        fit_in_the_scope()


def values_of_all_replicas():
    hl.function(total)(batch_of(strategy()))


def each_replica():
    replicas = strategy()
    step = hl.function(total)
    sums = replicas.experimental_local_results(replicas.run(step, (batch_of(replicas),)))
    with replicas.scope():
        variable = keras.Variable(2.0)
    grad = hl.grad(lambda x: ops.sum(x) * variable, wrt=variable)
    grads = replicas.experimental_local_results(replicas.run(grad, (batch_of(replicas),)))
    raise AssertionError([float(value) for value in (*sums, *grads)])


def message(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (fit_in_the_scope, "Create and train the model outside of strategy.scope(), on one device"),
        (fit_outside_of_the_scope, "Create and train the model outside of strategy.scope(), on one device"),
        (fit_eagerly_in_the_scope, "Create and train the model outside of strategy.scope(), on one device"),
        (values_of_all_replicas, "A step received a PerReplica"),
    ],
)
def test_fit_and_hl_function_refuse_a_strategy_with_several_replicas(function, words):
    with forkserver.Pool(1) as pool:
        kind, said = pool.apply(message, (function,))
    assert kind == StepError.__name__
    assert words in said


def test_hl_function_and_hl_grad_run_on_each_replica_of_a_strategy():
    with forkserver.Pool(1) as pool:
        assert pool.apply(message, (each_replica,)) == ("AssertionError", "[12.0, 12.0, 12.0, 12.0]")


def test_fit_trains_in_the_scope_of_a_strategy_with_one_replica():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = compiled(sequential(layers.Dense(1, kernel_initializer="zeros")))
    assert fit(model, X, X[:, :1])["loss"] == [1.0]
