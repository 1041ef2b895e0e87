"""PyTorch: steps traced whole, and the internals of torch and Keras that this needs."""

import logging

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from keras.src.backend.torch import core
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import handloom as hl
from handloom.backends import backend
from handloom.backends.program import Untraceable
from handloom.backends.torch import backend as ours
from handloom.backends.torch import program as programs
from handloom.errors import FallbackWarning, TraceError
from tests.models import built, compiled, fit, subclassed
from tests.numbers import close, normal, numpy, ones, same

X = torch.ones(3)


# -------------------------------------------------------------------------- programs


def test_trace_gives_a_graph_without_keras():
    calls = []

    def fn(x):
        calls.append(1)
        return [ops.relu(x) * 2]

    program = backend.trace(fn, [X], jit_compile="auto")
    traced = len(calls)
    for _ in range(3):
        close(program([X])[0], 2 * ones(3))
    assert len(calls) == traced


def test_function_changes_variables_in_place():
    variable = keras.Variable(ones(3))
    step = hl.function(lambda: variable.assign_add(ones(3)))
    step()
    before = variable.value.data_ptr()
    step()
    assert variable.value.data_ptr() == before
    close(variable, 3 * ones(3))


def test_function_returns_tensors_that_keep_no_computation_alive(eagerly):
    layer = built(layers.Dense(1))
    result, weight = hl.function(lambda x: (layer(x), layer.kernel))(ones(2, 3))
    assert not result.requires_grad
    assert not weight.requires_grad


def test_function_takes_an_argument_that_requires_gradients(eagerly):
    x = torch.ones(3, requires_grad=True)
    close(hl.function(lambda x: x * 2)(x), 2 * ones(3))
    assert x.grad is None


def test_function_reads_variables_of_any_strides():
    variable = keras.Variable(torch.arange(6.0).reshape(2, 3).T)
    step = hl.function(lambda: ops.reshape(variable.assign_add(ones(3, 2)), (-1,)))
    close(step(), 1 + np.arange(6).reshape(2, 3).T.ravel())


# ---------------------------------------------------------- steps in torch's own manner


def test_function_compiles_a_step_that_calls_backward():
    layer, optimizer = built(layers.Dense(1, use_bias=False, kernel_initializer="ones")), keras.optimizers.SGD(0.5)
    optimizer.build(layer.trainable_variables)

    @hl.function
    def step(x):
        loss = ops.sum(layer(x))
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in layer.trainable_variables], layer.trainable_variables)
        return loss

    close(step(ones(1, 3)), 3)
    close(step(ones(1, 3)), 1.5)
    assert [trace.compiled for trace in step.traces] == [True]


def test_function_draws_random_numbers_of_torch_from_its_seed():
    draw = hl.function(lambda x: x + torch.rand(4))
    torch.manual_seed(3)
    compiled = numpy([draw(ones(4)) for _ in range(2)])
    torch.manual_seed(3)
    with hl.run_eagerly(True):
        same([draw(ones(4)) for _ in range(2)], compiled)
    assert (compiled[0] != compiled[1]).any()


# ------------------------------------------------------------------------- falling back


def test_function_that_cannot_be_traced_falls_back_and_warns_once():
    total = keras.Variable(0.0)

    @hl.function
    def step(x):
        total.assign_add(float(ops.sum(x)))
        return total * 2

    with pytest.warns(FallbackWarning, match=r"slower\): .*step uses the value of .*py, line \d+: total") as warned:
        close(step(ones(3)), 6)
    assert [each.filename for each in warned if each.category is FallbackWarning] == [__file__]
    # From here on, a warning would be an error.
    close(step(ones(3)), 12)
    close(step(ones(4)), 20)
    close(total, 10)
    assert [trace.compiled for trace in step.traces] == [False, False]
    assert all("uses the value of a tensor" in trace.reason for trace in step.traces)


def test_function_raises_an_error_of_shapes_and_logs_nothing(caplog):
    product = hl.function(lambda x: ops.matmul(x, ones(4, 2)))
    with caplog.at_level(logging.ERROR, logger="torch"), pytest.raises(RuntimeError, match="shapes cannot be mult"):
        product(ones(2, 3))
    assert caplog.records == []


def test_trace_refuses_a_graph_with_a_fake_tensor_in_it():
    graph = make_fx(lambda x: [x + 1])(torch.ones(3))
    programs._check_closed(graph)
    with FakeTensorMode():
        graph._tensor_constant0 = torch.ones(3)
    with pytest.raises(TraceError, match="HL102"):
        programs._check_closed(graph)
    with pytest.raises(Untraceable, match="uses a tensor that the operation cannot pass"):
        programs._check_closed(torch.nn.Sequential(graph))  # As the function given to an operation is inside a graph.


# ---------------------------------------------------------------------------- Inductor


def with_kernels(kernels):
    """Traces a step, with `torch.compile` replaced; returns the program and its variable."""
    variable = keras.Variable(ones(3))

    def fn(x):
        variable.assign_add(x)
        return [ops.sum(variable * x)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", kernels)
        program = backend.trace(fn, [X], jit_compile=True)
    close(variable, ones(3))
    return program, variable


def broken(graph, **options):
    def run(*values):
        raise RuntimeError("no compiler\nand many more lines")

    return run


REFUSED = {
    "other results": (lambda graph, **_: lambda *values: [x + 1 for x in graph(*values)], "its results differ"),
    "no new values": (lambda graph, **_: lambda *values: graph(*[x.clone() for x in values]), "its results differ"),
    "an error": (broken, "no compiler"),
}


@pytest.mark.parametrize(("kernels", "reason"), REFUSED.values(), ids=REFUSED)
def test_trace_with_kernels_that_fail_or_disagree_warns_and_uses_the_graph(kernels, reason):
    with pytest.warns(FallbackWarning, match=rf"Inductor could not compile a step \({reason}\)"):
        program, variable = with_kernels(kernels)
    close(program([X])[0], 6)
    close(variable, 2 * ones(3))


def test_trace_uses_kernels_that_agree():
    used = []

    def kernels(graph, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        return lambda *values: (used.append(1), graph(*values))[1]

    program, variable = with_kernels(kernels)
    used.clear()
    program([X])
    assert used == [1]
    close(variable, 2 * ones(3))


# ----------------------------------------------------------------------- half precision


def test_to_tensor_copies_from_pinned_memory_to_cuda_asynchronously(monkeypatch):
    done = []

    class Watched(torch.Tensor):
        def pin_memory(self):
            done.append("pinned")
            return self

        def to(self, **options):
            done.append(options)
            return self

    monkeypatch.setattr("keras.src.backend.torch.core.get_device", lambda: "cuda")
    backend.to_tensor(torch.ones(2).as_subclass(Watched))
    assert done == [{"dtype": torch.float32}, "pinned", {"device": "cuda", "non_blocking": True}]


def test_to_numpy_reads_bfloat16_as_float32():
    array = backend.to_numpy(torch.tensor([0.5, 2.0], dtype=torch.bfloat16))
    assert array.dtype == np.float32
    same(array, [0.5, 2])


# ------------------------------------------------------------ internals of torch's own


@pytest.mark.parametrize("name", ["ceil", "floor", "round", "sign", "trunc"])
def test_grad_knows_operations_without_a_gradient_by_the_names_of_their_nodes(name):
    x = torch.ones(3, requires_grad=True)
    node = getattr(torch, name)(x).grad_fn
    assert node.name().rstrip("0123456789") in ours._WITHOUT_GRADIENT
    assert hl.grad(lambda x: ops.sum(getattr(torch, name)(x)))(ones(3)) is None


def test_to_tensor_uses_the_device_of_keras():
    with core.device_scope("meta"):
        assert backend.to_tensor(ones(3)).device.type == "meta"
    assert backend.to_tensor(ones(3)).device.type == core.get_device()


def test_function_refuses_python_control_flow_over_a_tensor_in_a_layer():
    class Branching(layers.Layer):
        def call(self, x):
            return x if ops.sum(x) > 0 else -x

    layer = Branching()
    with pytest.raises(TraceError, match=r"return x if ops.sum\(x\) > 0"):
        hl.function(layer)(ones(3))


# ------------------------------------------------------------------- Keras's loop over time steps

SERIES = normal(8, 3, 3)
SERIES[3, 2:] = SERIES[5, 1:] = 0  # Masked.


class Cell(layers.Layer):
    state_size = 2

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1] + 2, 2))

    def call(self, inputs, states):
        state = ops.tanh(ops.concatenate([inputs, states[0]], -1) @ self.kernel)
        return state, [state]


RECURRENT = {
    "SimpleRNN": lambda: [layers.SimpleRNN(2)],
    "backwards": lambda: [layers.SimpleRNN(2, go_backwards=True)],
    "masked LSTM": lambda: [layers.Masking(), layers.LSTM(2)],
    "masked GRU": lambda: [layers.Masking(), layers.GRU(2, return_sequences=True), layers.SimpleRNN(2)],
    "GRU, reset before": lambda: [layers.GRU(2, reset_after=False)],
    "RNN": lambda: [layers.RNN(Cell())],
    "stacked cells": lambda: [layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)])],
    "Bidirectional": lambda: [layers.Bidirectional(layers.SimpleRNN(2))],
    "LSTM, dropout": lambda: [layers.LSTM(2, dropout=0.3, recurrent_dropout=0.2, seed=3)],
    "GRU, dropout": lambda: [layers.GRU(2, dropout=0.3, seed=3)],
    "stateful": lambda: [layers.SimpleRNN(2, stateful=True)],
    "ConvLSTM1D": lambda: [layers.Reshape((3, 3, 1)), layers.ConvLSTM1D(2, 2), layers.Flatten()],
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_fit_compiles_recurrent_layers_with_the_numbers_of_keras(kind, eagerly):
    histories = []
    for cls in (keras.Sequential, hl.Sequential):
        keras.utils.set_random_seed(0)
        model = cls([*RECURRENT[kind](), layers.Dense(1)])
        model.build(SERIES.shape)
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=cls is keras.Sequential)
        run = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
        histories.append(model.fit(SERIES, normal(8, 1), **run).history["loss"])
    close(histories[1], histories[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["SimpleRNN", "masked LSTM"])
def test_fit_eagerly_builds_recurrent_layers(kind):
    model = compiled(subclassed(*RECURRENT[kind](), layers.Dense(1), inputs=None), run_eagerly=True)
    assert np.isfinite(fit(model, SERIES, normal(8, 1))["loss"]).all()


def test_function_falls_back_where_keras_itself_uses_a_value():
    count = hl.function(lambda n: ops.linspace(0.0, 1.0, n))
    with pytest.warns(FallbackWarning, match=r"numpy.linspace uses the value of a tensor in Python \(.*line .*count ="):
        close(count(np.int32(3)), [0, 0.5, 1])


def test_hl_fit_that_falls_back_names_the_metric_and_the_line():
    metric = keras.metrics.MeanIoU(2, name="overlap")

    def step(truth, guess):
        metric.update_state(truth, guess)
        return {"overlap": metric}

    labels = np.int32([0, 1, 1, 0])
    reason = r"core\.scatter uses the value of a tensor in Python, in the metric 'overlap' .*: metric\.update_state"
    with pytest.warns(FallbackWarning, match=reason):
        assert hl.fit(step, hl.Feed((labels, labels)), verbose=0).history["overlap"] == [1.0]
