"""PyTorch: a step is traced whole, backward pass and optimizer included, into one flat graph of operations.

Keras code runs once on stand-ins for tensors to find its variables, and once more under `make_fx`, which records
every operation down to the in-place updates. The graph then runs with no Keras in between; see
`graph.py`. What cannot be traced runs op by op.

Internals used: `Variable._value` (see `handloom/_keras.py`), `keras.src.backend.torch.core.get_device` and, while
tracing, the `core` of `torch_nadam`, which takes numbers out of tensors; `make_fx`, which records, and
`disable_proxy_modes_tracing`, which has it not look; `FakeTensorMode` with `ShapeEnv`, the stand-ins, and the logger
that shows a traceback where their shapes do not fit; the nodes of autograd with their names, which tell what reaches a
value; `Module._modules`, where torch puts the layers that are set as attributes of a layer;
`torch._C._AutoDispatchBelowAutograd`, which skips the look at each operation for something to differentiate,
where the graph holds its own backward pass already.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from keras.src.backend.torch import core
from keras.src.backend.torch.optimizers import torch_nadam
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from handloom._interop.onnx_torch import exportable
from handloom._interop.tensors import tensor_of
from handloom._keras import Tensor, Variable, current_value, first_line, keras, stored_value
from handloom._util.warnings import warn
from handloom.backends.base import Backend, Gradients, Untraceable
from handloom.backends.scope import Recorder, Scope, refuse
from handloom.backends.source_line import frames_of, naming_what_has_no_derivative, needs_a_value, tensorflow_called
from handloom.backends.torch.control_flow import traceable_control_flow
from handloom.backends.torch.graph import generate, mark, take_marks, tidy
from handloom.backends.torch.modules import modules_read_variables, parameters_made
from handloom.backends.torch.random import traceable_random_ops
from handloom.errors import ExportError, FallbackWarning, HandloomError

Step = Callable[..., Sequence[Tensor]]


class TorchBackend(Backend):
    name = "torch"

    def is_array(self, leaf: Any) -> bool:
        return isinstance(leaf, (torch.Tensor, np.ndarray, np.generic))

    def to_tensor(self, array: Any) -> Tensor:
        if not isinstance(array, torch.Tensor):
            array = np.require(array, array.dtype.newbyteorder("="), ["C_CONTIGUOUS", "WRITEABLE"])
            array = tensor_of("torch", array, copy=False)
        dtype = getattr(torch, keras.config.floatx()) if array.dtype == torch.float64 else array.dtype
        device = core.get_device()
        # From pinned memory CUDA copies by itself, and nobody waits; else the copy would wait for the step under way.
        waits = not device.startswith("cuda") or array.device.type != "cpu" or self.nested
        array = array.to(dtype=dtype)
        return array.to(device=device) if waits else array.pin_memory().to(device=device, non_blocking=True)

    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype.
            tensor = tensor.float()
        return np.asarray(tensor.numpy())

    def detach(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def attributes(self, thing: Any) -> dict[str, Any]:
        inside = thing._modules if isinstance(thing, torch.nn.Module) else {}
        return {name: value for name, value in vars(thing).items() if name != "_modules"} | inside

    def random_state(self) -> dict[str, np.ndarray]:
        states = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["torch_cuda"] = torch.cuda.get_rng_state()
        return {name: state.numpy() for name, state in states.items()}

    def set_random_state(self, state: dict[str, np.ndarray]) -> None:
        if "torch" in state:
            torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
        if "torch_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.from_numpy(state["torch_cuda"].copy()))

    def profiled(self, directory: Path) -> Any:
        write = torch.profiler.tensorboard_trace_handler(str(directory))
        return torch.profiler.profile(on_trace_ready=write)

    @contextlib.contextmanager
    def exporting(self, format: str) -> Iterator[None]:  # noqa: A002
        if format == "tf_saved_model":
            raise ExportError(
                "On PyTorch a model cannot be exported as a TensorFlow SavedModel: Keras does it by torch_xla, of "
                'which there is no version for this PyTorch. Use export(..., format="onnx"), or let TensorFlow do it: '
                'model.save("model.keras"), then KERAS_BACKEND=tensorflow python -c "from handloom import Model; '
                "from keras.saving import load_model; load_model('model.keras', compile=False).export('exported')\"."
            )
        with exportable():
            yield

    def trace(
        self,
        fn: Step,
        tensors: Sequence[Tensor],
        *,
        jit_compile: bool | str,
        unused: Callable[[str], None] = lambda _: None,
    ) -> TorchProgram:
        try:
            with self._inside("trace"), torch.no_grad():
                program = TorchProgram(fn, tensors)
        except HandloomError:
            raise
        except _NeedsValue as error:
            raise needs_a_value(frames_of(error)) from error
        except Exception as first:
            if refusal := tensorflow_called(frames_of(first), self.name):
                raise refusal from first
            program = self._trace_with_gradients_recorded(fn, tensors, first)
        for name in program.unused_marks:
            unused(name)
        if self.compiles_kernels(jit_compile):
            program.compile_kernels(_contiguous(tensors))
        return program

    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        return jit_compile is True

    def _trace_with_gradients_recorded(self, fn: Step, tensors: Sequence[Tensor], first: Exception) -> TorchProgram:
        """For a step in torch's own manner, `loss.backward()`: every variable records what is done with it."""
        try:
            with self._inside("trace"), torch.enable_grad():
                return TorchProgram(fn, tensors)
        except Exception:
            raise Untraceable(_reason(first)) from first

    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        return mark(tensor, name)

    def create_variables(self, fn: Callable[[], Any]) -> None:
        already = self._nesting.trace > 0
        mode = disable_proxy_modes_tracing() if already else FakeTensorMode(allow_non_fake_inputs=True)
        with self._inside("trace"), parameters_made(), Scope(creates=True), torch.no_grad(), _tracing(), mode:
            fn()

    @naming_what_has_no_derivative("PyTorch")
    def value_and_grad(
        self,
        fn: Callable[..., tuple[Tensor, list[Tensor]]],
        tensors: Sequence[Tensor],
        variables: Sequence[Variable],
    ) -> tuple[Tensor, list[Tensor], Gradients, Gradients]:
        keep = self._nesting.gradient > 0
        sources = _Sources(tensors, variables, keep)
        with self._inside("gradient"), torch.enable_grad():
            value, aux = sources.call(fn)
            gradients = _reached(value, sources.values, functools.partial(_gradient, keep=keep))
        sources.write()
        if not keep:
            value, aux = value.detach(), [tensor.detach() for tensor in aux]
        return value, aux, *sources.split(gradients)

    @naming_what_has_no_derivative("PyTorch")
    def jacobian(
        self,
        fn: Callable[..., tuple[list[Tensor], list[Tensor]]],
        tensors: Sequence[Tensor],
        variables: Sequence[Variable],
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[Gradients, Gradients]]]:
        keep = self._nesting.gradient > 0
        sources = _Sources(tensors, variables, keep)
        with self._inside("gradient"), torch.enable_grad():
            outputs, aux = sources.call(fn)
            derivative = functools.partial(_jacobian, keep=keep)
            rows = [_reached(output, sources.values, derivative) for output in outputs]
        sources.write()
        if not keep:
            outputs, aux = [tensor.detach() for tensor in outputs], [tensor.detach() for tensor in aux]
        return outputs, aux, [sources.split(row) for row in rows]


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = first_line(error)
    return text if isinstance(error, Untraceable) else f"{type(error).__name__}: {text}"


class TorchProgram:
    """A step as one graph over its variables' memory, which it changes in place."""

    def __init__(self, fn: Step, tensors: Sequence[Tensor]) -> None:
        tensors = _contiguous(tensors)
        self._variables = _find_variables(fn, tensors)
        graph = make_fx(
            functools.partial(_run_on, fn, self._variables), tracing_mode="fake", _allow_non_fake_inputs=True
        )
        with _tracing():
            self._graph = graph(*self._values(), *tensors)
        _check_closed(self._graph)
        self.unused_marks = take_marks(self._graph)
        tidy(self._graph)
        self._step = generate(self._graph)
        self._guard: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd

    def compile_kernels(self, tensors: Sequence[Tensor]) -> None:
        """Has Inductor generate kernels for the graph, and keeps them if they give the same results."""
        kernels = torch.compile(self._graph, fullgraph=True, dynamic=False)
        with warnings.catch_warnings():  # Of torch's own making, and nobody's to mend here.
            warnings.simplefilter("ignore")
            try:
                reason = "" if self._agree(kernels, tensors) else "its results differ"
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
        if reason:
            message = f"Inductor could not compile a step, which runs as a plain graph instead ({reason})."
            warn(message, FallbackWarning)
        else:
            self._step, self._guard = kernels, torch.no_grad

    def _agree(self, kernels: Step, tensors: Sequence[Tensor]) -> bool:
        """Runs the step both ways on copies of its variables: whether results and variables come out the same."""
        inputs = [[tensor.detach().clone() for tensor in [*self._values(), *tensors]] for _ in range(2)]
        with torch.no_grad():
            outputs = [step(*values) for step, values in zip((self._step, kernels), inputs, strict=True)]
        if any(
            torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in self._graph.graph.nodes
        ):
            return True  # It draws its own random numbers.
        pairs = zip([*outputs[0], *inputs[0]], [*outputs[1], *inputs[1]], strict=True)
        return all(torch.allclose(one, two, rtol=1e-2, atol=1e-4, equal_nan=True) for one, two in pairs)

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with self._guard():
            return self._step(*self._values(), *_contiguous(tensors))

    def _values(self) -> list[Tensor]:
        return [variable._value for variable in self._variables]


def _check_closed(graph: torch.fx.GraphModule) -> None:
    """Refuses a graph that holds a stand-in: a tensor without values, which some operation was given unseen."""
    for module in graph.modules():
        if any(isinstance(value, FakeTensor) for value in [*vars(module).values(), *module.buffers(recurse=False)]):
            raise Untraceable("a function given to an operation uses a tensor that the operation cannot pass to it")


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
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
        _tracing(),
        fake,
        shapes.ignore_fresh_unbacked_symbols(),
    ):
        fn(*map(stand_in, tensors))
    known = {id(variable): variable for variable in [*recorder.variables, *scope.written]}
    return list(known.values())


def _run_on(fn: Step, variables: list[Variable], *values: Tensor) -> list[Tensor]:
    """Runs a step with the variables at the given values, which it changes in place, as op by op."""
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


class _Sources:
    """What a function is differentiated with respect to: tensors, then variables.

    Args:
        tensors: As for `Backend.value_and_grad`.
        variables: As for `Backend.value_and_grad`.
        keep: Whether an enclosing function is differentiated too, through these sources.
    """

    def __init__(self, tensors: Sequence[Tensor], variables: Sequence[Variable], keep: bool) -> None:
        self._count = len(tensors)
        self._variables = variables
        self._updates: list[tuple[Variable, Tensor]] = []
        self.values = [_stand_in(tensor, keep) for tensor in [*tensors, *map(current_value, variables)]]

    def call(self, fn: Callable[..., Any]) -> Any:
        """Calls `fn` with stand-ins for all sources; keeps aside what it writes."""
        bindings = zip(self._variables, self.values[self._count :], strict=True)
        with parameters_made(), Scope(bindings, creates=True) as scope, modules_read_variables():
            result = fn(*self.values[: self._count])
        if scope.incomplete:
            return self.call(fn)
        self._updates = [(variable, scope.get_current_value(variable)) for variable in scope.written]
        return result

    def write(self) -> None:
        """Carries what the function wrote outward, once."""
        for variable, new in self._updates:
            variable.assign(new)

    def split(self, gradients: Gradients) -> tuple[Gradients, Gradients]:
        return gradients[: self._count], gradients[self._count :]


def _stand_in(tensor: Tensor, keep: bool) -> Tensor:
    """The same values under an identity of their own, so that only uses through it are differentiated."""
    return tensor.view_as(tensor) if keep and tensor.requires_grad else tensor.detach().requires_grad_()


def _gradient(value: Tensor, sources: list[Tensor], *, keep: bool) -> Gradients:
    return list(torch.autograd.grad(value, sources, allow_unused=True, create_graph=keep))


def _jacobian(output: Tensor, sources: list[Tensor], *, keep: bool) -> Gradients:
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device).reshape(-1, *output.shape)
    options = {"allow_unused": True, "retain_graph": True, "create_graph": keep}
    columns = torch.autograd.grad(output, sources, basis, is_grads_batched=True, **options)
    return [None if column is None else column.reshape(output.shape + column.shape[1:]) for column in columns]


def _reached(
    value: Tensor, sources: list[Tensor], derivative: Callable[[Tensor, list[Tensor]], Gradients]
) -> Gradients:
    """Derivatives with respect to the sources that reach the value, `None` for the others."""
    ends = _ends(value)
    reached = [source for source in sources if (source.grad_fn or id(source)) in ends]
    found = dict(zip(map(id, reached), derivative(value, reached), strict=True)) if reached else {}
    return [found.get(id(source)) for source in sources]


# Torch gives these the derivative zero, where the other backends give none.
_WITHOUT_GRADIENT = {f"{name}Backward" for name in ("Ceil", "Floor", "Round", "Sign", "Trunc")}


def _ends(value: Tensor) -> set[Any]:
    """Where differentiation of a value arrives: every node on the way, and the ids of the leaves."""
    ends: set[Any] = {id(value)}
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in ends or node.name().rstrip("0123456789") in _WITHOUT_GRADIENT:
            continue
        ends.add(node)
        if hasattr(node, "variable"):
            ends.add(id(node.variable))
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return ends


class _NoValues(TorchFunctionMode):
    """While a step is traced, refuses `if tensor:` and `range(tensor)`; torch itself refuses the rest."""

    _ASKING = (torch.Tensor.__bool__, torch.Tensor.__index__)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in self._ASKING and isinstance(args[0], FakeTensor):
            raise _NeedsValue
        return func(*args, **(kwargs or {}))


class _NeedsValue(Exception):
    """Python asked for the value of a tensor that has none."""


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Where Keras code runs on tensors without values."""
    with traceable_random_ops(), traceable_control_flow(), _traceable_nadam(), _NoValues(), _not_logged():
        yield


@contextlib.contextmanager
def _traceable_nadam() -> Iterator[None]:
    """Lets Keras's Nadam divide by tensors, where op by op it makes NumPy numbers of them first."""
    before, torch_nadam.core = torch_nadam.core, SimpleNamespace(convert_to_numpy=lambda tensor: tensor)
    try:
        yield
    finally:
        torch_nadam.core = before


@contextlib.contextmanager
def _not_logged() -> Iterator[None]:
    """Keeps torch from logging an error over many lines that then is raised."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


backend = TorchBackend()
