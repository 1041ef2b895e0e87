"""PyTorch: a step as one flat graph of operations on its variables' memory, with backward pass and optimizer.

Keras code runs once on fake tensors to find its variables, and once more under `make_fx`, which records every
operation, in-place updates included. The graph then runs without Keras; see `graph.py`.

Internals used: `Variable._value` (see `handloom/_keras.py`); while tracing, the `core` of `torch_nadam`, which converts
tensors to numbers; `make_fx`, which records; `FakeTensorMode` with `ShapeEnv`, and the logger that shows a traceback
if shapes of fake tensors do not match; `torch._C._AutoDispatchBelowAutograd`, which skips autograd: the graph contains
its own backward pass.
"""

import contextlib
import functools
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from keras.src.backend.torch.optimizers import torch_nadam
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from handloom._keras import Tensor, Tensors, Variable, keras, stored_value
from handloom._util.findings import warn
from handloom._util.patch import Patch
from handloom.backends.layer_at_work import described, layer_at_work
from handloom.backends.program import Program, Step, Untraceable
from handloom.backends.scope import Recorder, Scope, refuse
from handloom.backends.torch.control_flow import traceable_control_flow
from handloom.backends.torch.fake import is_traced
from handloom.backends.torch.graph import (
    dependencies,
    draws_from_generators,
    generate,
    remove_marks,
    tidy,
    written_in_place,
)
from handloom.backends.torch.images import batched_transforms
from handloom.backends.torch.modules import in_steps, parameters_in_trace, parameters_made
from handloom.backends.torch.native import real_tensors_kept
from handloom.backends.torch.random import traceable_random_ops
from handloom.backends.trace_errors import leaked
from handloom.errors import FallbackWarning

# The number of values of a tensor that are compared between two compilations of a step.
_COMPARED = 1 << 16


class TorchProgram(Program):
    """A step, traced; it changes its variables in place.

    Args:
        fn: The step.
        tensors: One set of arguments.
    """

    def __init__(self, fn: Step, tensors: Tensors) -> None:
        tensors = contiguous(tensors)
        self._variables = _find_variables(fn, tensors)
        run = functools.partial(_run_on, fn, self._variables)
        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
        with tracing():
            self._graph = graph(*self._values(), *tensors)
        _check_closed(self._graph)
        changed = written_in_place(self._graph.graph)
        placeholders = [node for node in self._graph.graph.nodes if node.op == "placeholder"]
        pairs = list(zip(self._variables, placeholders, strict=False))
        self.written = tuple(variable for variable, node in pairs if node in changed)
        self.read = tuple(variable for variable, node in pairs if node not in changed)
        self.dependencies = dependencies(self._graph.graph, placeholders[len(pairs) :])
        self.unsaved = ["a torch.Generator"] if draws_from_generators(self._graph) else []
        remove_marks(self._graph)
        tidy(self._graph)
        self._step = generate(self._graph)
        self._guard: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd

    def __call__(self, tensors: Tensors) -> Tensors:
        with self._guard():
            return self._step(*self._values(), *contiguous(tensors))

    def pure(
        self, written: Tensors, read: Tensors, tensors: Tensors, *, step: Step | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        news = [value.detach().clone() for value in written]
        values = dict(zip(map(id, [*self.written, *self.read]), [*news, *read], strict=True))
        step = self._step if step is None else step
        with torch.no_grad():
            results = step(*(values[id(variable)] for variable in self._variables), *contiguous(tensors))
        return news, list(results)

    def compile_kernels(self, tensors: Tensors) -> None:
        """Generates kernels for the graph with Inductor; uses them if they give the same results."""
        kernels = torch.compile(self._graph, fullgraph=True, dynamic=False)
        with warnings.catch_warnings():  # Torch's own, which no user can fix.
            warnings.simplefilter("ignore")
            try:
                reason = "" if self._agrees(kernels, tensors) else "its results differ"
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
        if reason:
            warn(
                f"HL107: Inductor could not compile a step ({reason}).",
                "The step runs as a plain graph (slower).",
                category=FallbackWarning,
            )
        else:
            self._step, self._guard = kernels, torch.no_grad

    def _agrees(self, kernels: Step, tensors: Tensors) -> bool:
        """Whether both compilations of the step give the same results, on copies of the variables."""
        plain, compiled = self._sample(self._step, tensors), self._sample(kernels, tensors)
        tags = [getattr(node.target, "tags", ()) for node in self._graph.graph.nodes]
        if any(torch.Tag.nondeterministic_seeded in each for each in tags):
            return True  # Operations draw random numbers of their own.
        agree = functools.partial(torch.allclose, rtol=1e-2, atol=1e-4, equal_nan=True)
        return all(agree(one, two) for one, two in zip(plain, compiled, strict=True))

    def _sample(self, step: Step, tensors: Tensors) -> list[Tensor]:
        """Some values of each result and new variable: two full copies of large variables may not fit in memory."""
        written, read = ([variable._value for variable in variables] for variables in (self.written, self.read))
        news, results = self.pure(written, read, tensors, step=step)
        return [_thinned(tensor) for tensor in [*news, *results]]

    def _values(self) -> list[Tensor]:
        return [variable._value for variable in self._variables]


def _thinned(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _COMPARED) or 1].clone()


def _check_closed(graph: torch.fx.GraphModule) -> None:
    """Refuses a graph with a fake tensor in it, which an operation received without the trace seeing it."""
    for module in graph.modules():
        if any(isinstance(value, FakeTensor) for value in [*vars(module).values(), *module.buffers(recurse=False)]):
            if module is graph:
                raise leaked(())
            raise Untraceable("a function given to an operation uses a tensor that the operation cannot pass to it")


def contiguous(tensors: Tensors) -> list[Tensor]:
    """Contiguous tensors: a graph contains the strides of the tensors that it was traced with."""
    return list(map(torch.Tensor.contiguous, tensors))


def _find_variables(fn: Step, tensors: Tensors) -> list[Variable]:
    """Runs a step on fake tensors; returns the variables that it reads or writes."""
    # Numbers taken out of fake tensors are unknown, which is no error here.
    shapes = ShapeEnv()
    unknown = shapes.ignore_fresh_unbacked_symbols()
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    stand_in = functools.partial(fake.from_tensor, static_shapes=True)
    recorder = Recorder(lambda variable: _as_leaf(stand_in(stored_value(variable)), variable))
    with parameters_made(), Scope(outer=recorder, creates=True) as scope, tracing(), fake, unknown:
        fn(*map(stand_in, tensors))
    known = {id(variable): variable for variable in [*recorder.variables, *scope.written]}
    return list(known.values())


def _run_on(fn: Step, variables: list[Variable], *values: Tensor) -> list[Tensor]:
    """Runs a step on these values of its variables, and changes them in place, as in eager execution."""
    count = len(variables)
    bindings = [(variable, _as_leaf(value, variable)) for variable, value in zip(variables, values, strict=False)]
    with _InPlace(bindings, outer=refuse):
        return [result.detach() for result in fn(*values[count:])]


class _InPlace(Scope):
    """Assigns into the memory of the value, as Keras's torch variables and optimizers do."""

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        variable, value = update
        with torch.no_grad():
            self.get_current_value(variable).copy_(value)


def _as_leaf(value: Tensor, variable: Variable) -> Tensor:
    """A value in whose `.grad` `loss.backward()` can leave a gradient, if the step is traced in that style."""
    value = value.detach()
    return value.requires_grad_() if torch.is_grad_enabled() and variable.trainable else value


class NeedsValue(Exception):
    """Python needed the value of a fake tensor."""


class TooLong(Untraceable):
    """A trace would take minutes."""


_MOST_CALLS, _SAMPLED = 10_000, 100
"""The calls of torch that a layer may make in a trace, about a minute of tracing; and how often the layer is noted."""


class _Bounded(TorchFunctionMode):
    """Refuses `if tensor:` and `range(tensor)` in a trace, which torch leaves to us, and loops that are too long.

    A tensor made of a Python number has a value: Keras's loop over time steps counts them so.
    """

    _ASKING = (torch.Tensor.__bool__, torch.Tensor.__index__)

    def __init__(self) -> None:
        super().__init__()
        self._calls, self._calls_of = 0, Counter[str]()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _package(sys._getframe(1)) != torch.__name__:  # torch calls itself, for each variable a hundred times.
            self._calls += 1
            if self._calls % _SAMPLED == 0:
                self._check_length()
        if func in self._ASKING and isinstance(args[0], FakeTensor) and args[0].constant is None:
            asking = asking_in(frame for frame, _ in traceback.walk_stack(None))
            if asking.startswith(f"{keras.__name__}."):
                raise Untraceable(f"{asking} uses the value of a tensor in Python")
            raise NeedsValue
        return func(*args, **(kwargs or {}))

    def _check_length(self) -> None:
        layer = layer_at_work(sys._getframe())
        if layer is None:
            return
        name = described(layer)
        self._calls_of[name] += _SAMPLED
        if self._calls_of[name] > _MOST_CALLS:
            raise TooLong(f"{name} has more than {_MOST_CALLS} operations: a loop in Python?")


def asking_in(frames: Iterable[FrameType]) -> str:
    """The function, of Keras or the user, that called torch; the innermost frame comes first."""
    frame = next((frame for frame in frames if _package(frame) not in _BETWEEN), None)
    return "the step" if frame is None else f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


_BETWEEN = (torch.__name__, __name__.partition(".")[0])

_traceable_nadam = Patch((torch_nadam, "core", lambda _: SimpleNamespace(convert_to_numpy=lambda x: x)), when=is_traced)
"""Lets Keras's Nadam divide by tensors, which it otherwise converts to NumPy numbers first."""

_not_logged = Patch((logging.getLogger("torch._subclasses.fake_tensor"), "handle", lambda _: lambda *_: None))
"""Keeps torch from logging an error that it also raises."""


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """A block in which Keras code runs on fake tensors."""
    patches = traceable_random_ops, traceable_control_flow, batched_transforms, parameters_in_trace, _traceable_nadam
    with contextlib.ExitStack() as stack:
        for context in (in_steps, *patches, real_tensors_kept(), _Bounded(), _not_logged):
            stack.enter_context(context)
        yield
