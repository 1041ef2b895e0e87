"""Traced torch graphs: the same numbers with less work."""

import dis

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from handloom.backends.torch.graph import generate, tidy
from tests.numbers import same

aten = torch.ops.aten


def step_of(fn, *tensors):
    """The step for a function, and the names of the operations that are left in it."""
    module = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    tidy(module)
    names = [node.target._schema.name for node in module.graph.nodes if hasattr(node.target, "_schema")]
    return generate(module), [name.removeprefix("aten::") for name in names]


def check(fn, *tensors):
    """Fails unless a step does to its arguments, and returns, what its function does, in two calls."""
    step, operations = step_of(fn, *tensors)
    ours, plain = ([tensor.clone() for tensor in tensors] for _ in range(2))
    for _ in range(2):
        for one, two in zip([*step(*ours), *ours], [*fn(*plain), *plain], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
    return operations


X = torch.arange(6.0).reshape(2, 3)

FUNCTIONS = {
    "arithmetic": lambda x: [x * 2 + 1, (x - 3).sum()],
    "several results of one operation": lambda x: [*x.max(dim=1), *x.split(1)],
    "in place": lambda x: [x.add_(1), x * 2],
    "in place through a view": lambda x: [x.view(-1).mul_(2).sum()],
    "in place through a slice": lambda x: [x[0].add_(10)],
    "in place before and after a use": lambda x: [x.mul_(2) + 0, x.sum(), x.add_(1)],
    "assigned": lambda x: [x.copy_(x.flip(0)), x.sum()],
    "a fresh tensor written to": lambda x: [torch.zeros(2, 3).add_(x), torch.ones(3).mul_(x[0])],
    "a part of a fresh tensor written to": lambda x: [torch.zeros(4, 3).index_copy_(0, torch.tensor([0, 2]), x)],
    "views": lambda x: [x.T, x[0], x.view(-1), x.detach(), x],
    "constants": lambda x: [torch.ones(3), torch.arange(3) * 2, x + torch.full((2, 3), 4.0)],
    "neutral": lambda x: [x * 1, x / 1, x**1, x * 1.0, torch.where(torch.tensor(True), x, x * 2)],
    "neutral but for the dtype": lambda x: [x.long() * 1.0, x.long() / 1],
    "half": lambda x: [(x.half() * 1).float(), x.to(torch.bfloat16) + 1],
    "empty": lambda x: [torch.empty(2, 3).copy_(x)],
    "options by name": lambda x: [x.sum(dim=1, keepdim=True), torch.cumsum(x, dim=0, dtype=torch.float64)],
    "lists of tensors": lambda x: [torch.cat([x, x], dim=1), torch.stack((x[0], x[1]))],
    "many at once": lambda x: [*torch._foreach_add([x, x * 2], 1)],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_generate_gives_a_step_that_does_what_its_function_does(name):
    check(FUNCTIONS[name], X.clone())


OPERATIONS = [
    lambda x: x * 1,
    lambda x: x + 1,
    lambda x: x.add_(1),
    lambda x: x.mul_(x),
    lambda x: x.T,
    lambda x: x[0:1].add_(1),
    lambda x: x.detach(),
    lambda x: x / 1,
    lambda x: torch.zeros_like(x).add_(x),
    lambda x: torch.where(torch.tensor(True), x, -x),
    lambda x: x.copy_(torch.sin(x)),
    lambda x: x * torch.ones_like(x),
    lambda x: x.contiguous().view(-1).view(x.shape),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(range(len(OPERATIONS))), min_size=1, max_size=6))
def test_generate_gives_the_same_numbers_for_any_operations(chosen):
    def fn(x):
        results = [x]
        for index in chosen:
            results.append(OPERATIONS[index](results[-1]))
        return results

    check(fn, X.clone())


SIMPLIFIED = {
    "constants are computed once": (lambda x: [x + torch.ones(3) * 2 - torch.arange(3)], ["add", "sub"]),
    "neutral operations are removed": (lambda x: [(x * 1 / 1 + 1).detach() * 1], ["add"]),
    "a known choice is made": (lambda x: [torch.where(torch.tensor(False), x * 2, x + 1) * 3], ["add", "mul"]),
    "unused results are removed": (lambda x: [(x.sin(), x.cos(), x + 1)[2]], ["add"]),
    "large constants are computed in each step": (lambda x: [x.sum() + torch.ones(300, 300)], ["sum", "ones", "add"]),
}


@pytest.mark.parametrize(("fn", "operations"), SIMPLIFIED.values(), ids=SIMPLIFIED)
def test_tidy_simplifies(fn, operations):
    assert check(fn, X) == operations


def test_tidy_draws_random_numbers_in_each_step():
    step, operations = step_of(lambda x: [x + torch.rand(4)], torch.ones(4))
    assert operations == ["rand", "add"]
    [first], [second] = step(torch.ones(4)), step(torch.ones(4))
    assert (first != second).any()


def test_tidy_gives_each_step_uninitialized_memory_of_its_own():
    step, operations = step_of(lambda x: [torch.empty(3).copy_(x), torch.empty(3)], torch.ones(3))
    first, second = step(torch.ones(3)), step(2 * torch.ones(3))
    same([first[0], second[0]], [np.ones(3), 2 * np.ones(3)])
    assert operations.count("empty") == 2


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T, lambda x: x[0], lambda x: x.detach().view(-1)])
def test_tidy_gives_results_that_share_no_memory_with_an_argument(view):
    step, _ = step_of(lambda x: [view(x)], X.clone())
    x = X.clone()
    [result] = step(x)
    x.add_(100)
    same(result, view(X))


def test_tidy_gives_results_that_share_no_memory_with_a_constant():
    step, _ = step_of(lambda x: [torch.ones(3), x], X.clone())
    step(X)[0].add_(100)
    same(step(X)[0], np.ones(3))


def test_tidy_leaves_a_result_that_is_a_view_with_the_last_write():
    """As in eager execution, where the result is the memory of the variable."""
    step, _ = step_of(lambda x: [x.detach(), x.add_(1)], X.clone())
    before, after = step(X.clone())
    np.testing.assert_array_equal(before, after)


def test_generate_deletes_values_after_their_last_use():
    step, _ = step_of(lambda x: [x.sin().cos().tan().sum()], X)
    dropped = [instruction for instruction in dis.get_instructions(step) if instruction.opname == "DELETE_FAST"]
    assert len(dropped) >= 3


def test_generate_writes_infinities_and_nan():
    [result] = step_of(lambda x: [torch.clamp(x / 0, max=float("inf")) + float("nan")], X)[0](X)
    assert torch.isnan(result).all()


def test_operators_of_torch_show_writes_and_views():
    assert isinstance(aten.add.Tensor, torch._ops.OpOverload)
    infos = {op: [a.alias_info for a in op._schema.arguments] for op in (aten.add_.Tensor, aten.view.default)}
    assert infos[aten.add_.Tensor][0].is_write
    assert not infos[aten.view.default][0].is_write
    assert aten.view.default._schema.returns[0].alias_info is not None
    assert aten.add.Tensor._schema.returns[0].alias_info is None
    assert aten.add_.Tensor._schema.is_mutable
    assert torch.Tag.nondeterministic_seeded in aten.rand.default.tags
    np.testing.assert_array_equal(aten.add.Tensor._op(X, X), 2 * X)
