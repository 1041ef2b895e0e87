"""PyTorch: a step as one flat graph of operations over its variables' memory, backward pass and optimizer included.

Keras code runs once on stand-ins for tensors to find its variables, and once more under `make_fx`, which records
every operation down to the in-place updates. The graph then runs with no Keras in between; see `graph.py`.

Internals used: `Variable._value` (see `handloom/_keras.py`); while tracing, the `core` of `torch_nadam`, which takes
numbers out of tensors; `make_fx`, which records; `FakeTensorMode` with `ShapeEnv`, the stand-ins, and the logger that
shows a traceback where their shapes do not fit; `torch._C._AutoDispatchBelowAutograd`, which skips the look at each
operation for something to differentiate, where the graph holds its own backward pass already.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from keras.src.backend.torch.optimizers import torch_nadam
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from handloom._keras import Tensor, Variable, stored_value
from handloom._util.findings import warn
from handloom._util.patch import Patch
from handloom.backends.program import Program, Step, Untraceable
from handloom.backends.scope import Recorder, Scope, refuse
from handloom.backends.torch.control_flow import traceable_control_flow
from handloom.backends.torch.graph import dependencies, generate, remove_marks, tidy, written_in_place
from handloom.backends.torch.modules import parameters_made
from handloom.backends.torch.random import traceable_random_ops
from handloom.backends.torch.stand_ins import is_traced
from handloom.errors import FallbackWarning

# So many values of a tensor stand for all of them where two ways to compute a step are compared.
_COMPARED = 1 << 16


class TorchProgram(Program):
    """A step, traced; it changes its variables in place.

    Args:
        fn: The step.
        tensors: One set of arguments.
    """

    def __init__(self, fn: Step, tensors: Sequence[Tensor]) -> None:
        tensors = contiguous(tensors)
        self._variables = _find_variables(fn, tensors)
        graph = make_fx(
            functools.partial(_run_on, fn, self._variables), tracing_mode="fake", _allow_non_fake_inputs=True
        )
        with tracing():
            self._graph = graph(*self._values(), *tensors)
        _check_closed(self._graph)
        changed = written_in_place(self._graph.graph)
        placeholders = [node for node in self._graph.graph.nodes if node.op == "placeholder"]
        pairs = list(zip(self._variables, placeholders, strict=False))
        self.written = tuple(variable for variable, node in pairs if node in changed)
        self.read = tuple(variable for variable, node in pairs if node not in changed)
        self.dependencies = dependencies(self._graph.graph, placeholders[len(pairs) :])
        remove_marks(self._graph)
        tidy(self._graph)
        self._step = generate(self._graph)
        self._guard: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with self._guard():
            return self._step(*self._values(), *contiguous(tensors))

    def pure(
        self, written: Sequence[Tensor], read: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self._pure(self._step, written, read, tensors)

    def _pure(
        self, step: Step, written: Sequence[Tensor], read: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        news = [value.detach().clone() for value in written]
        values = dict(zip(map(id, [*self.written, *self.read]), [*news, *read], strict=True))
        with torch.no_grad():
            results = step(*(values[id(variable)] for variable in self._variables), *contiguous(tensors))
        return news, list(results)

    def compile_kernels(self, tensors: Sequence[Tensor]) -> None:
        """Has Inductor generate kernels for the graph, and keeps them if they give the same results."""
        kernels = torch.compile(self._graph, fullgraph=True, dynamic=False)
        with warnings.catch_warnings():  # Of torch's own making, and nobody's to mend here.
            warnings.simplefilter("ignore")
            try:
                reason = "" if self._agrees(kernels, tensors) else "its results differ"
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
        if reason:
            message = f"Inductor could not compile a step, which runs as a plain graph instead ({reason})."
            warn("HL107", message, category=FallbackWarning)
        else:
            self._step, self._guard = kernels, torch.no_grad

    def _agrees(self, kernels: Step, tensors: Sequence[Tensor]) -> bool:
        """Runs the step both ways, one after the other, on copies of what it changes: whether the same comes out."""
        plain, compiled = self._sample(self._step, tensors), self._sample(kernels, tensors)
        if any(
            torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in self._graph.graph.nodes
        ):
            return True  # It draws its own random numbers.
        return all(
            torch.allclose(one, two, rtol=1e-2, atol=1e-4, equal_nan=True)
            for one, two in zip(plain, compiled, strict=True)
        )

    def _sample(self, step: Step, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Values of all that a run leaves, at equal distances: two whole copies of large variables may not fit."""
        written, read = ([variable._value for variable in variables] for variables in (self.written, self.read))
        news, results = self._pure(step, written, read, tensors)
        return [_thinned(tensor) for tensor in [*news, *results]]

    def _values(self) -> list[Tensor]:
        return [variable._value for variable in self._variables]


def _thinned(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _COMPARED) or 1].clone()


def _check_closed(graph: torch.fx.GraphModule) -> None:
    """Refuses a graph that holds a stand-in: a tensor without values, which some operation was given unseen."""
    for module in graph.modules():
        if any(isinstance(value, FakeTensor) for value in [*vars(module).values(), *module.buffers(recurse=False)]):
            raise Untraceable("a function given to an operation uses a tensor that the operation cannot pass to it")


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors laid out as a graph expects them: it has the strides of those it was traced with written into it."""
    return list(map(torch.Tensor.contiguous, tensors))


def _find_variables(fn: Step, tensors: Sequence[Tensor]) -> list[Variable]:
    """Runs a step on stand-ins: the variables it reads or writes."""
    # Numbers taken out of tensors have no value here, and nothing waits to learn where they came from.
    shapes = ShapeEnv()
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    stand_in = functools.partial(fake.from_tensor, static_shapes=True)
    recorder = Recorder(lambda variable: _as_leaf(stand_in(stored_value(variable)), variable))
    with (
        parameters_made(),
        Scope(outer=recorder, creates=True) as scope,
        tracing(),
        fake,
        shapes.ignore_fresh_unbacked_symbols(),
    ):
        fn(*map(stand_in, tensors))
    known = {id(variable): variable for variable in [*recorder.variables, *scope.written]}
    return list(known.values())


def _run_on(fn: Step, variables: list[Variable], *values: Tensor) -> list[Tensor]:
    """Runs a step with the variables at the given values, which it changes in place, as eagerly."""
    count = len(variables)
    bindings = [(variable, _as_leaf(value, variable)) for variable, value in zip(variables, values, strict=False)]
    with _InPlace(bindings, outer=refuse):
        return [result.detach() for result in fn(*values[count:])]


class _InPlace(Scope):
    """Assigns as Keras's torch variables do, into the memory of the value; so do Keras's torch optimizers."""

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        variable, value = update
        with torch.no_grad():
            self.get_current_value(variable).copy_(value)


def _as_leaf(value: Tensor, variable: Variable) -> Tensor:
    """A value whose gradient `loss.backward()` can leave in `.grad`, where the step is traced in that manner."""
    value = value.detach()
    return value.requires_grad_() if torch.is_grad_enabled() and variable.trainable else value


class NeedsValue(Exception):
    """Python asked for the value of a tensor that has none."""


class _NoValues(TorchFunctionMode):
    """While a step is traced, refuses `if tensor:` and `range(tensor)`; torch itself refuses the rest."""

    _ASKING = (torch.Tensor.__bool__, torch.Tensor.__index__)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in self._ASKING and isinstance(args[0], FakeTensor):
            raise NeedsValue
        return func(*args, **(kwargs or {}))


_traceable_nadam = Patch(
    (torch_nadam, "core", lambda _: SimpleNamespace(convert_to_numpy=lambda tensor: tensor)), when=is_traced
)
"""Lets Keras's Nadam divide by tensors, where eagerly it makes NumPy numbers of them first."""

_not_logged = Patch((logging.getLogger("torch._subclasses.fake_tensor"), "handle", lambda _: lambda *_: None))
"""Keeps torch from logging an error over many lines that then is raised."""


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Where Keras code runs on tensors without values."""
    with traceable_random_ops, traceable_control_flow, _traceable_nadam, _NoValues(), _not_logged:
        yield
