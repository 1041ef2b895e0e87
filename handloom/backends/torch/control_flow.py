"""Compiled `keras.ops.cond`, `while_loop` and `fori_loop` on torch.

On torch, Keras runs these as Python `if` and `while`, which a trace cannot record. While a step is traced, they become
torch's own control-flow operations. Those take everything that a branch uses as arguments, while Keras code closes over
tensors and variables. So a branch runs once outside of the trace to see what it uses, and then again with arguments in
place of that. Variables that a branch assigns become results of it.

Internals used: `cond`, `while_loop`, `fori_loop` of `core` (see `_keras.py`; replaced while tracing) and torch's
`cond_op` and `while_loop_op` (`torch.cond` and `torch.while_loop` would first compile the branch in another way);
`FakeTensor`, to recognize tensors of the trace; `disable_proxy_modes_tracing`, for the run outside of the trace.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Self

import optree
import torch
from torch._guards import detect_fake_mode
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.while_loop import while_loop_op
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode

from handloom._keras import Tensors, Variable, core, get_stateless_scope, holders_of_core, keras, value_in
from handloom._util.patch import Patch
from handloom.backends.program import Untraceable
from handloom.backends.scope import Reader, Scope
from handloom.backends.torch.fake import is_traced
from handloom.backends.torch.native import changes_first


class _Closure(TorchFunctionMode):
    """Records the tensors that a function uses and did not compute itself, or replaces them by others.

    Keras's torch optimizers write into the values of variables. Such a value is copied; the copy replaces it from then
    on, and is assigned to the variable.
    """

    def __init__(self, known: Tensors, replacements: dict[int, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.used: dict[int, torch.Tensor] = {}
        self.values: dict[int, Variable] = {}
        self.assigned: list[tuple[Variable, torch.Tensor]] = []
        self._replacements = replacements or {}
        self._copies: dict[int, torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in known}

    def __enter__(self) -> Self:
        _open.set((*_open.get(), self))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        _open.set(_open.get()[:-1])
        super().__exit__(*details)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = optree.tree_map(self.replace, (tuple(args), kwargs or {}))
        if changes_first(func):
            args = (optree.tree_map(functools.partial(self._copy_of, func), args[0]), *args[1:])
        result = func(*args, **kwargs)
        self.note_made(optree.tree_leaves(result))
        return result

    def note_made(self, leaves: Sequence[Any]) -> None:
        self._made.update((id(leaf), leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))

    def replace(self, leaf: Any) -> Any:
        if isinstance(leaf, keras.Variable):
            leaf = leaf.value
        if isinstance(leaf, FakeTensor) and id(leaf) not in self._made and id(leaf) not in self._copies:
            self.used[id(leaf)] = leaf
        leaf = self._replacements.get(id(leaf), leaf)
        return self._copies.get(id(leaf), leaf)

    def _copy_of(self, func: Callable[..., Any], leaf: Any) -> Any:
        """The tensor to write into in place of this one."""
        if not isinstance(leaf, torch.Tensor) or (id(leaf) in self._made and id(leaf) not in self.values):
            return leaf
        if id(leaf) not in self.values:
            raise Untraceable(f"{func.__name__} changes a tensor in place in a branch or loop")
        copy = self._copies[id(leaf)] = leaf.clone()
        self._made[id(copy)] = copy
        self.assigned.append((self.values[id(leaf)], copy))
        return copy


_open: ContextVar[tuple[_Closure, ...]] = ContextVar("open", default=())

open_branches = _open.get
"""The branches and loops in which the caller runs."""


def _as_seen_here(tensors: Tensors) -> list[torch.Tensor]:
    """Tensors as the enclosing branch sees them, if there is one: it does not see control-flow operations."""
    around = _open.get()
    return [around[-1].replace(tensor) for tensor in tensors] if around else list(tensors)


def _show_made(results: Tensors) -> None:
    if around := _open.get():
        around[-1].note_made(results)


class _Values(Scope):
    """Tells a closure which tensors are the values of variables."""

    def __init__(self, closure: _Closure, outer: Reader) -> None:
        super().__init__(outer=outer)
        self._closure = closure

    def get_current_value(self, variable: Variable) -> torch.Tensor:
        self._take_assigned()
        value = self._closure.replace(super().get_current_value(variable))
        self._closure.values[id(value)] = variable
        return value

    @property
    def written(self) -> list[Variable]:
        self._take_assigned()
        return super().written

    def _take_assigned(self) -> None:
        while self._closure.assigned:
            self.add_update(self._closure.assigned.pop(0))


class _Branch:
    """A function for a control-flow operation: the tensors that it closes over and assigns, and its explicit form.

    Args:
        fn: A function of the carried tensors.
        carried: Examples of them.
    """

    def __init__(self, fn: Callable[..., Any], carried: Tensors) -> None:
        self._fn = fn
        # A branch runs again when it is differentiated, then outside of its original scope.
        self.outer = functools.partial(value_in, get_stateless_scope())
        with _aside():
            carried = [tensor.view_as(tensor) for tensor in carried]  # The branch may close over one, too.
        with _aside(), _Closure(carried) as closure, _Values(closure, self.outer) as scope:
            self.results, self.structure = optree.tree_flatten(fn(*carried))
            self.results = [closure.replace(core.convert_to_tensor(result)) for result in self.results]
            self.written = scope.written
            for variable in self.written:
                closure.replace(scope.get_current_value(variable))
        self.used = list(closure.used.values())

    def explicit(self, used: Tensors, written: Sequence[Variable], carried: int) -> Callable[..., Any]:
        """The same function of the carried tensors and `used`; returns its results, then the values of `written`."""

        def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
            replacements = dict(zip(map(id, used), operands[carried:], strict=True))
            with _Closure(operands, replacements) as closure, _Values(closure, self.outer) as scope:
                results = optree.tree_leaves(self._fn(*operands[:carried]))
                results += [scope.get_current_value(variable) for variable in written]
                # The operations do not accept an argument as a result.
                return tuple(core.convert_to_tensor(closure.replace(result)).clone() for result in results)

        return run


def _cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    pred = pred.value if isinstance(pred, keras.Variable) else pred
    if not isinstance(pred, FakeTensor) or pred.is_meta:
        return _original["cond"](pred, true_fn, false_fn)
    branches = [_Branch(true_fn, ()), _Branch(false_fn, ())]
    if branches[0].structure != branches[1].structure:
        raise Untraceable(
            "the branches of keras.ops.cond return different structures: "
            f"{branches[0].structure} and {branches[1].structure}"
        )
    written = _distinct(branches[0].written + branches[1].written)
    # A variable that one branch assigns is passed through by the other.
    used = _distinct([*branches[0].used, *branches[1].used, *map(branches[0].outer, written)])
    runs = [branch.explicit(used, written, carried=0) for branch in branches]
    results = _either(pred.reshape(()).to(torch.bool), runs, _as_seen_here(used))
    _show_made(results)
    count = len(branches[0].results)
    for variable, value in zip(written, results[count:], strict=True):
        variable.assign(value)
    return optree.tree_unflatten(branches[0].structure, results[:count])


def _either(pred: torch.Tensor, runs: Sequence[Callable[..., Any]], used: Tensors) -> list[torch.Tensor]:
    """The results of one of two functions of the tensors in `used`."""
    graphs = [_traced(run, used) for run in runs]
    examples = [node.meta["val"] for node in graphs[0].graph.output_node().args[0]]
    _show_made(examples)
    kinds = [example.is_floating_point() for example in examples]
    if not torch.is_grad_enabled() or all(kinds):
        return list(cond_op(pred, *graphs, tuple(used))) if kinds else []
    # The derivative of the operation fails for whole numbers among its results: they are computed separately.
    results: dict[int, torch.Tensor] = {}
    for floating in (True, False):
        indices = [index for index, kind in enumerate(kinds) if kind is floating]
        parts = [_traced(functools.partial(_only, graph, indices), used) for graph in graphs]
        with contextlib.nullcontext() if floating else torch.no_grad():
            results.update(zip(indices, cond_op(pred, *parts, tuple(used)) if indices else (), strict=True))
    return [results[index] for index in range(len(kinds))]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """A block in which a branch runs without being recorded in the graph of the step.

    Numbers that it takes out of tensors, such as a learning rate, are not recorded either.
    """
    mode = detect_fake_mode()
    shapes = None if mode is None else mode.shape_env
    with disable_proxy_modes_tracing(), shapes.ignore_fresh_unbacked_symbols() if shapes else contextlib.nullcontext():
        yield


def _traced(fn: Callable[..., Any], operands: Tensors) -> torch.fx.GraphModule:
    """A function as a graph of its own, with the operations of its gradients."""
    with _aside():
        module = make_fx(fn)(*operands)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _only(graph: torch.fx.GraphModule, indices: Sequence[int], *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = graph(*operands)
    return tuple(results[index] for index in indices)


def _while_loop(
    cond: Callable[..., Any], body: Callable[..., Any], loop_vars: Any, maximum_iterations: int | None = None
) -> Any:
    single = not isinstance(loop_vars, (tuple, list))
    leaves, structure = optree.tree_flatten((loop_vars,) if single else tuple(loop_vars))
    carried = [core.convert_to_tensor(leaf) for leaf in leaves]
    carried.append(torch.zeros((), dtype=torch.int64))  # The number of iterations.

    def condition(*carried: torch.Tensor) -> torch.Tensor:
        more = core.convert_to_tensor(cond(*optree.tree_unflatten(structure, carried[:-1]))).reshape(())
        return more if maximum_iterations is None else more & (carried[-1] < maximum_iterations)

    def advance(*carried: torch.Tensor) -> list[torch.Tensor]:
        news = body(*optree.tree_unflatten(structure, carried[:-1]))
        news = optree.tree_leaves(tuple(news) if isinstance(news, (tuple, list)) else (news,))
        return [_as_carried(new, old) for new, old in zip(news, carried, strict=False)] + [carried[-1] + 1]

    results = optree.tree_unflatten(structure, _loop(condition, advance, carried)[:-1])
    return results[0] if single else results


def _as_carried(new: Any, old: torch.Tensor) -> torch.Tensor:
    new = core.convert_to_tensor(new)
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise Untraceable(f"loop variables change from {old.dtype}{tuple(old.shape)} to {new.dtype}{tuple(new.shape)}")
    return new


def _loop(condition: Callable[..., Any], advance: Callable[..., Any], carried: Tensors) -> Tensors:
    branches = [_Branch(condition, carried), _Branch(advance, carried)]
    used = _distinct(branches[0].used + branches[1].used)
    if branches[1].written:
        names = ", ".join(variable.path for variable in branches[1].written)
        raise Untraceable(f"variables ({names}) are assigned in the body of a loop; carry their values instead")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in [*carried, *used]):
        raise Untraceable("the gradient of a loop needs a number of iterations that is known before the step runs")
    continues, body = (branch.explicit(used, (), len(carried)) for branch in branches)
    results: Tensors = while_loop_op(
        lambda *operands: continues(*operands)[0], body, tuple(_as_seen_here(carried)), tuple(_as_seen_here(used))
    )
    _show_made(results)
    return results


def _fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init_val: Any) -> Any:
    def advance(index: Any, value: Any) -> tuple[Any, Any]:
        return index + 1, body_fun(index, value)

    init_val = optree.tree_map(core.convert_to_tensor, init_val)
    if isinstance(lower, int) and isinstance(upper, int) and torch.is_grad_enabled():
        return _original["fori_loop"](lower, upper, body_fun, init_val)
    upper = core.convert_to_tensor(upper)
    lower = core.convert_to_tensor(lower, dtype=upper.dtype)
    return _while_loop(lambda index, _: index < upper, advance, (lower, init_val))[1]


def _distinct(items: Sequence[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())


_compiled = {"cond": _cond, "while_loop": _while_loop, "fori_loop": _fori_loop}
_original = {name: getattr(core, name) for name in _compiled}

traceable_control_flow = Patch(
    *(
        (holder, name, lambda _, function=function: function)
        for holder in holders_of_core
        for name, function in _compiled.items()
    ),
    when=is_traced,
)
"""Inside, `keras.ops.cond`, `while_loop` and `fori_loop` are compiled."""
