"""Layers that a step builds: the tensors that they keep have values, whatever runs first."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from tests.models import compiled, fit, subclassed
from tests.numbers import close, normal, numpy, ones, same_values

MEAN, VARIANCE = np.float32([1, 2, 3]), np.float32([1, 4, 9])
X, Y = normal(8, 3), normal(8, 1, seed=1)
TABLE = np.float32([0, 1, 2])


class Table(layers.Layer):
    """Keeps a tensor, and one that it computes from its weights."""

    def build(self, shape):
        self.weight = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.table = ops.arange(shape[-1], dtype="float32")
        self.first = 2 * self.weight.value
        self.weight.assign(3 * self.weight)

    def call(self, x):
        return x * self.table * self.weight * ops.stop_gradient(self.first)


class Both(layers.Layer):
    """Has no `build` of its own, so that Keras builds its parts by a call."""

    def __init__(self):
        super().__init__()
        self.norm, self.table = layers.Normalization(mean=MEAN, variance=VARIANCE), Table()

    def call(self, x):
        return self.table(self.norm(x))


class BuildingItsPart(layers.Layer):
    """Builds its part in `call`."""

    def __init__(self):
        super().__init__()
        self.table = Table()

    def call(self, x):
        if not self.table.built:
            self.table.build(x.shape)
        return self.table(x)


NORMALIZED = (X - MEAN) / np.sqrt(VARIANCE)
PARTS = {
    "Normalization": (lambda: layers.Normalization(mean=MEAN, variance=VARIANCE), NORMALIZED),
    "own": (Table, 6 * TABLE * X),
    "nested": (Both, 6 * TABLE * NORMALIZED),
    "in call": (BuildingItsPart, 6 * TABLE * X),
    "Sequential": (lambda: keras.Sequential([Table(), Table()]), 36 * TABLE**2 * X),
}


def unbuilt(part):
    return compiled(subclassed(part(), layers.Dense(1, kernel_initializer="ones"), inputs=None))


def with_hl_function(model):
    return hl.function(model)(X)


def with_value_and_grad(model):
    (value, outputs), _ = hl.value_and_grad(lambda x: (ops.sum(model(x)), model(x)), has_aux=True)(X)
    close(value, ops.sum(outputs))
    return outputs


def minimize(model, optimizer):
    def loss():
        outputs = model(X)
        return ops.mean((outputs - ops.convert_to_tensor(Y)) ** 2), outputs

    return hl.minimize(loss, model, optimizer, has_aux=True)[1]


CALLS = {
    "predict": lambda model: model.predict(X, verbose=0),
    "function": with_hl_function,
    "value_and_grad": with_value_and_grad,
    "minimize": lambda model: minimize(model, model.optimizer),
    "minimize_in_function": lambda model: hl.function(lambda: minimize(model, model.optimizer))(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", PARTS)
def test_model_builds_layers_that_keep_tensors(kind, call, eagerly):
    part, expected = PARTS[kind]
    model = unbuilt(part)
    expected = expected.sum(axis=1, keepdims=True)
    close(CALLS[call](model), expected, rtol=1e-4, atol=1e-5)
    if "minimize" not in call:
        close(model(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PARTS)
def test_fit_evaluate_and_train_on_batch_build_layers_that_keep_tensors(kind, eagerly):
    part, expected = PARTS[kind]
    loss = np.mean((expected.sum(axis=1, keepdims=True) - Y) ** 2)
    close(fit(unbuilt(part), X, Y, batch_size=8)["loss"], [loss], rtol=1e-4)
    close(unbuilt(part).evaluate(X, Y, verbose=0), loss, rtol=1e-4)
    close(unbuilt(part).train_on_batch(X, Y), loss, rtol=1e-4)


@pytest.mark.parametrize("kind", PARTS)
def test_hl_fit_builds_layers_that_keep_tensors(kind, eagerly):
    part, expected = PARTS[kind]
    model, optimizer = unbuilt(part), keras.optimizers.SGD(0.1)

    def step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)}

    history = hl.fit(step, hl.Feed((X, Y), batch_size=8), verbose=0).history
    close(history["loss"], [np.mean((expected.sum(axis=1, keepdims=True) - Y) ** 2)], rtol=1e-4)


def test_fit_builds_a_stateful_layer(eagerly):
    series, state, expected = normal(4, 5, 3), np.zeros((4, 2)), []
    recurrent = layers.SimpleRNN(2, stateful=True)
    model = compiled(subclassed(recurrent, inputs=None), keras.optimizers.SGD(0.0))
    losses = fit(model, series, Y[:4], batch_size=4, epochs=3)["loss"]
    kernel, recurrence, bias = map(numpy, recurrent.trainable_variables)
    for _ in losses:
        for k in range(series.shape[1]):
            state = np.tanh(series[:, k] @ kernel + state @ recurrence + bias)
        expected.append(np.mean((state - Y[:4]) ** 2))
    close(losses, expected)
    close(recurrent.states[0], state)


def test_fit_initializes_layers_as_a_call_does():
    def model():
        seed = keras.random.SeedGenerator(5)
        kernels = [keras.initializers.RandomNormal(seed=seed) for _ in range(2)]
        return compiled(subclassed(*(layers.Dense(3, kernel_initializer=kernel) for kernel in kernels), inputs=None))

    called, fitted = model(), model()
    for part in called.parts:
        part.build((None, 3))
    fit(compiled(fitted, keras.optimizers.SGD(0.0)), X, X)
    same_values(called.parts, fitted.parts)


@pytest.mark.backend("tensorflow", "torch")  # JAX has no values while it differentiates.
def test_hl_run_eagerly_builds_layers_of_a_loss_that_needs_values():
    dense, calls = layers.Dense(1, kernel_initializer="ones"), keras.Variable(0.0)

    def loss():
        calls.assign_add(1.0)
        value = ops.mean(dense(X) ** 2)
        return value if value > 0 else -value

    with hl.run_eagerly(True):
        close(hl.minimize(loss, dense, keras.optimizers.SGD(0.1)), np.mean(X.sum(axis=1) ** 2))
    close(calls, 1)


def test_function_does_not_count_what_build_reads_as_used(eagerly):
    seed = keras.random.SeedGenerator(0)
    dense = layers.Dense(1, kernel_initializer=keras.initializers.RandomNormal(seed=seed))
    step = hl.function(lambda x: dense(x))  # noqa: PLW0108
    step(X)
    assert all(variable is not seed.state for variable in step.touched)


def test_create_variables_of_a_function_that_fails_raises_its_error():
    def fn():
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        backend.create_variables(fn)


def test_function_gives_build_no_tensor_of_the_trace():
    seen = []

    class Look(layers.Layer):
        def build(self, shape):
            self.kept = ops.sum(ops.ones(shape[1:]))
            seen.append(float(self.kept))

        def call(self, x):
            return x * self.kept

    close(hl.function(Look())(ones(2, 3)), 3 * ones(2, 3))
    assert seen == [3]
