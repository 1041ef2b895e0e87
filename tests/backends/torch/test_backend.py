"""PyTorch: steps traced whole, and what of torch and Keras they rely on."""

import logging

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from keras.src.backend.torch import core
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import handloom as hl
from handloom.backends import backend
from handloom.backends.program import Untraceable
from handloom.backends.torch import backend as ours
from handloom.backends.torch import program as programs
from handloom.errors import FallbackWarning, TraceError


def ones(*shape):
    return np.ones(shape, "float32")


def close(actual, expected, rtol=1e-6):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=rtol)


# -------------------------------------------------------------------------- programs


def test_a_program_is_a_graph_without_keras():
    calls = []

    def fn(x):
        calls.append(1)
        return [ops.relu(x) * 2]

    program = backend.trace(fn, [torch.ones(3)], jit_compile="auto")
    traced = len(calls)
    for _ in range(3):
        close(program([torch.ones(3)])[0], 2 * ones(3))
    assert len(calls) == traced


def test_variables_change_in_place():
    variable = keras.Variable(ones(3))
    step = hl.function(lambda: variable.assign_add(ones(3)))
    step()
    before = variable.value.data_ptr()
    step()
    assert variable.value.data_ptr() == before
    close(variable, 3 * ones(3))


def test_what_comes_out_keeps_no_computation_alive(eagerly):
    layer = layers.Dense(1)
    layer.build((None, 3))
    result, weight = hl.function(lambda x: (layer(x), layer.kernel))(ones(2, 3))
    assert not result.requires_grad
    assert not weight.requires_grad


def test_an_argument_may_ask_for_gradients(eagerly):
    x = torch.ones(3, requires_grad=True)
    close(hl.function(lambda x: x * 2)(x), 2 * ones(3))
    assert x.grad is None


def test_a_tensor_may_have_other_strides_than_the_one_traced_with():
    square = torch.arange(9.0).reshape(3, 3)
    for first, second in ((square, square.T), (square.T, square)):
        flat = hl.function(lambda x: ops.reshape(x, (-1,)) * 1)
        close(flat(first), first.reshape(-1))
        close(flat(second), second.reshape(-1))


def test_variables_may_have_any_strides():
    variable = keras.Variable(torch.arange(6.0).reshape(2, 3).T)
    step = hl.function(lambda: ops.reshape(variable.assign_add(ones(3, 2)), (-1,)))
    close(step(), 1 + np.arange(6).reshape(2, 3).T.ravel())


# ---------------------------------------------------------- steps in torch's own manner


def test_a_step_that_calls_backward_is_compiled():
    layer, optimizer = layers.Dense(1, use_bias=False, kernel_initializer="ones"), keras.optimizers.SGD(0.5)
    layer.build((None, 3))
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


def test_torchs_own_random_numbers_stay_random_and_follow_its_seed():
    draw = hl.function(lambda x: x + torch.rand(4))
    torch.manual_seed(3)
    compiled = [ops.convert_to_numpy(draw(ones(4))) for _ in range(2)]
    torch.manual_seed(3)
    with hl.run_eagerly(True):
        plain = [ops.convert_to_numpy(draw(ones(4))) for _ in range(2)]
    np.testing.assert_array_equal(compiled, plain)
    assert (compiled[0] != compiled[1]).any()


# ------------------------------------------------------------------------- falling back


def test_a_step_that_cannot_be_traced_runs_op_by_op_and_says_so_once():
    total = keras.Variable(0.0)

    @hl.function
    def step(x):
        total.assign_add(float(ops.sum(x)))
        return total * 2

    with pytest.warns(FallbackWarning, match=r"could not be compiled.*slower\): GuardOnDataDep") as warned:
        close(step(ones(3)), 6)
    assert [each.filename for each in warned if each.category is FallbackWarning] == [__file__]
    # From here on, a warning would be an error.
    close(step(ones(3)), 12)
    close(step(ones(4)), 20)
    close(total, 10)
    assert [trace.compiled for trace in step.traces] == [False, False]
    assert all(trace.reason.startswith("eager: GuardOnDataDependent") for trace in step.traces)


def test_the_backend_gives_the_reason():
    with pytest.raises(Untraceable, match="GuardOnDataDependent"):
        backend.trace(lambda x: [x * float(ops.sum(x))], [torch.ones(3)], jit_compile="auto")


def test_an_error_of_the_steps_own_is_no_reason_to_run_op_by_op_for_ever():
    broken = [True]

    @hl.function
    def step(x):
        if broken:
            raise RuntimeError("broken")
        return x * 2

    with pytest.raises(RuntimeError, match="broken"):
        step(ones(3))
    assert step.traces == []
    broken.clear()
    close(step(ones(3)), 2 * ones(3))
    assert [trace.compiled for trace in step.traces] == [True]


def test_shapes_that_do_not_fit_are_an_error_and_nothing_in_the_log(caplog):
    product = hl.function(lambda x: ops.matmul(x, ones(4, 2)))
    with caplog.at_level(logging.ERROR, logger="torch"), pytest.raises(RuntimeError, match="shapes cannot be mult"):
        product(ones(2, 3))
    assert caplog.records == []


def test_a_graph_with_a_tensor_without_values_is_refused():
    graph = make_fx(lambda x: [x + 1])(torch.ones(3))
    programs._check_closed(graph)
    with FakeTensorMode():
        graph._tensor_constant0 = torch.ones(3)
    with pytest.raises(Untraceable, match="uses a tensor that the operation cannot pass"):
        programs._check_closed(graph)


# ---------------------------------------------------------------------------- Inductor


def traced():
    variable = keras.Variable(ones(3))

    def fn(x):
        variable.assign_add(x)
        return [ops.sum(variable * x)]

    return variable, fn


def test_kernels_that_give_other_results_are_not_used(monkeypatch):
    variable, fn = traced()
    monkeypatch.setattr(torch, "compile", lambda graph, **options: lambda *values: [x + 1 for x in graph(*values)])
    with pytest.warns(FallbackWarning, match="Inductor could not compile.*its results differ"):
        program = backend.trace(fn, [torch.ones(3)], jit_compile=True)
    close(variable, ones(3))
    close(program([torch.ones(3)])[0], 6)
    close(variable, 2 * ones(3))


def test_kernels_that_change_variables_otherwise_are_not_used(monkeypatch):
    _, fn = traced()

    def forgetful(graph, **options):
        return lambda *values: graph(*[value.clone() for value in values])

    monkeypatch.setattr(torch, "compile", forgetful)
    with pytest.warns(FallbackWarning, match="its results differ"):
        backend.trace(fn, [torch.ones(3)], jit_compile=True)


def test_kernels_that_cannot_be_made_are_done_without(monkeypatch):
    variable, fn = traced()

    def broken(graph, **options):
        def run(*values):
            raise RuntimeError("no compiler\nand many lines more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(FallbackWarning, match=r"runs as a plain graph instead \(no compiler\)"):
        program = backend.trace(fn, [torch.ones(3)], jit_compile=True)
    program([torch.ones(3)])
    close(variable, 2 * ones(3))


def test_kernels_that_agree_are_used(monkeypatch):
    variable, fn = traced()
    used = []

    def kernels(graph, **options):
        assert options == {"fullgraph": True, "dynamic": False}

        def run(*values):
            used.append(1)
            return graph(*values)

        return run

    monkeypatch.setattr(torch, "compile", kernels)
    program = backend.trace(fn, [torch.ones(3)], jit_compile=True)
    used.clear()
    program([torch.ones(3)])
    assert used == [1]
    close(variable, 2 * ones(3))


# ----------------------------------------------------------------------- half precision


def test_on_cuda_a_batch_is_moved_from_pinned_memory_and_not_waited_for(monkeypatch):
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


def test_bfloat16_is_read_as_float32():
    array = backend.to_numpy(torch.tensor([0.5, 2.0], dtype=torch.bfloat16))
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [0.5, 2])


# ------------------------------------------------------------ internals of torch's own


def test_a_stand_in_has_no_value_to_ask_for():
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()).from_tensor(
        torch.ones(3), static_shapes=True
    )
    assert isinstance(fake, FakeTensor)
    assert tuple(fake.shape) == (3,)
    with programs._NoValues():
        for ask in (bool, lambda x: range(x.long().sum())):
            with pytest.raises(programs.NeedsValue):
                ask(fake.sum() > 0 if ask is bool else fake)


def test_a_trace_can_be_told_not_to_look():
    def fn(x):
        with disable_proxy_modes_tracing():
            torch.sin(x)
        return torch.cos(x)

    graph = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(3)).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert names == ["aten.cos.default"]


def test_the_look_for_something_to_differentiate_can_be_skipped():
    weight = torch.ones(3, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        weight.add_(1)  # With it, torch refuses to change a leaf.
        assert not (weight * 2).requires_grad
    close(weight, 2 * ones(3))


@pytest.mark.parametrize("name", ["ceil", "floor", "round", "sign", "trunc"])
def test_operations_without_a_gradient_are_known_by_the_names_of_their_nodes(name):
    x = torch.ones(3, requires_grad=True)
    node = getattr(torch, name)(x).grad_fn
    assert node.name().rstrip("0123456789") in ours._WITHOUT_GRADIENT
    assert hl.grad(lambda x: ops.sum(getattr(torch, name)(x)))(ones(3)) is None


def test_the_nodes_of_autograd_lead_to_the_leaves():
    x = torch.ones(3, requires_grad=True)
    ends = ours._ends((x * 2).sum())
    assert id(x) in ends


def test_the_device_is_the_one_of_keras():
    with core.device_scope("meta"):
        assert backend.to_tensor(ones(3)).device.type == "meta"
    assert backend.to_tensor(ones(3)).device.type == core.get_device()


def test_python_over_a_tensor_is_refused_also_in_a_layer():
    class Branching(layers.Layer):
        def call(self, x):
            return x if ops.sum(x) > 0 else -x

    layer = Branching()
    with pytest.raises(TraceError, match=r"return x if ops.sum\(x\) > 0"):
        hl.function(layer)(ones(3))
