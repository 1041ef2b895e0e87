"""PyTorch: whole steps are traced (see `program.py`); autograd computes gradients. Steps without a trace run eagerly.

Internals used: `core.get_device` (see `_keras.py`); `disable_proxy_modes_tracing`, which pauses a trace;
`FakeTensorMode`, in which layers are built without values; the nodes of autograd and their names, which show what
reaches a value; `Module._modules`, where torch keeps the layers that are attributes of a layer.
"""

import contextlib
import functools
import re
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from handloom._interop.onnx_torch import exportable
from handloom._interop.tensors import tensor_of
from handloom._keras import Gradients, Tensor, Tensors, Variable, core, current_value, first_line, keras
from handloom._util.source_line import frames_of
from handloom.backends.base import Backend, Derivatives, Outputs
from handloom.backends.dependencies import reached
from handloom.backends.program import Seen, Step, Untraceable
from handloom.backends.scope import Scope
from handloom.backends.torch.control_flow import open_branches
from handloom.backends.torch.graph import mark
from handloom.backends.torch.modules import in_steps, modules_read_variables, outside, parameters_made
from handloom.backends.torch.program import NeedsValue, TooLong, TorchProgram, asking_in, contiguous, tracing
from handloom.backends.trace_errors import described_place, leaked, needs_a_value, read_by_numpy, tensorflow_called
from handloom.errors import ExportError, HandloomError, TraceError


class TorchBackend(Backend):
    name, title, tested = "torch", "PyTorch", ("2.12", "2.15")
    outside = staticmethod(outside)
    in_steps = in_steps

    def is_array(self, leaf: Any) -> bool:
        return isinstance(leaf, (torch.Tensor, np.ndarray, np.generic))

    def to_tensor(self, array: Any) -> Tensor:
        if not isinstance(array, torch.Tensor):
            array = np.require(array, array.dtype.newbyteorder("="), ["C_CONTIGUOUS", "WRITEABLE"])
            array = tensor_of("torch", array, copy=False)
        dtype = getattr(torch, keras.config.floatx()) if array.dtype == torch.float64 else array.dtype
        device = core.get_device()
        # CUDA copies from pinned memory asynchronously; other copies would wait for the running step.
        waits = not device.startswith("cuda") or array.device.type != "cpu" or self.nested
        array = array.to(dtype=dtype)
        return array.to(device=device) if waits else array.pin_memory().to(device=device, non_blocking=True)

    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def key(self, leaf: Any) -> Hashable:
        return leaf.shape, leaf.dtype, type(leaf), leaf.device

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
                "HL601: On PyTorch, a model cannot be exported as a TensorFlow SavedModel.",
                "Keras uses torch_xla for it, which does not exist for this version of PyTorch.",
                'Use export(..., format="onnx"), or export with TensorFlow: model.save("model.keras"), then '
                'KERAS_BACKEND=tensorflow python -c "from handloom import Model; from keras.saving import load_model; '
                "load_model('model.keras', compile=False).export('exported')\".",
            )
        with exportable():
            yield

    def _program(self, fn: Step, tensors: Tensors, seen: Seen, kernels: bool) -> TorchProgram:
        try:
            with self._in_trace.here(True), torch.no_grad():
                program = TorchProgram(fn, tensors)
        except HandloomError:
            raise
        except TooLong as error:
            raise Untraceable(first_line(error)) from error
        except NeedsValue as error:
            raise needs_a_value(frames_of(error)) from error
        except Exception as first:
            if refusal := tensorflow_called(frames_of(first), self.name):
                raise refusal from first
            program = self._trace_with_gradients_recorded(fn, tensors, first)
        if kernels:
            program.compile_kernels(contiguous(tensors))
        return program

    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        return jit_compile is True

    def _trace_with_gradients_recorded(self, fn: Step, tensors: Tensors, first: Exception) -> TorchProgram:
        """Traces a step in torch's own style, `loss.backward()`: autograd records every use of a variable."""
        try:
            with self._in_trace.here(True), torch.enable_grad():
                return TorchProgram(fn, tensors)
        except Untraceable as error:
            # Keras raises the errors of layers anew, with lines added.
            raise Untraceable(first_line(error) + described_place(error), _unsaved(error)) from first
        except Exception:
            raise Untraceable(_reason(first) + described_place(first)) from first

    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        return mark(tensor, name)

    def unreadable(self, error: Exception) -> TraceError | None:
        if _MEETS_NUMPY.search(str(error)):
            return read_by_numpy(frames_of(error))
        return leaked(frames_of(error)) if _MEETS_SHAPES.search(str(error)) else None

    def create_variables(self, fn: Callable[[], Any]) -> None:
        with parameters_made():
            super().create_variables(fn)

    def _run_on_shapes(self, fn: Callable[[], Any]) -> None:
        already = self._in_trace.get()
        mode = disable_proxy_modes_tracing() if already else FakeTensorMode(allow_non_fake_inputs=True)
        with self._in_trace.here(True), Scope(creates=True), torch.no_grad(), tracing(), mode:
            fn()

    def _derivatives(self, fn: Outputs, tensors: Tensors, variables: Sequence[Variable], scalar: bool) -> Derivatives:
        keep = self.depth > 0
        sources = [_copy(tensor, keep) for tensor in [*tensors, *map(current_value, variables)]]
        derivative = functools.partial(_gradient if scalar else _jacobian, keep=keep)
        with self._differentiating(), torch.enable_grad():
            try:
                (outputs, aux), updates = _called(fn, sources, variables)
            except (RuntimeError, TypeError) as error:
                if self._in_trace.get() or not (clear := self.unreadable(error)):
                    raise
                raise clear from error
            rows = [_reached(output, sources, derivative) for output in outputs]
        for variable, new in updates:
            variable.assign(new)
        if not keep:
            outputs, aux = ([tensor.detach() for tensor in found] for found in (outputs, aux))
        return outputs, aux, rows

    def _twice(self, term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
        first, second = _Twice.apply(term, included)
        return first, second

    @property
    def _branch(self) -> Any:
        return open_branches()


_MEETS_NUMPY = re.compile(
    r"Can't call numpy\(\) on Tensor that requires grad|can't convert \S+ device type tensor to numpy"
)

_MEETS_SHAPES = re.compile(r"on device meta|devices, \S+ and meta|devices, meta and")
"""Keras has called a layer on shapes alone, and the layer has kept a tensor of that call."""


def _reason(error: Exception) -> str:
    """Why a step cannot be traced."""
    if isinstance(error, _NEED_VALUES) or isinstance(error.__context__, _NEED_VALUES):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        return f"{asking_in(reversed(frames))} uses the value of a tensor in Python"
    return ("" if isinstance(error, Untraceable) else f"{type(error).__name__}: ") + first_line(error)


_NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def _unsaved(error: BaseException | None) -> Sequence[str]:
    while error is not None and not getattr(error, "unsaved", ()):
        error = error.__context__
    return getattr(error, "unsaved", ())


def _called(fn: Outputs, values: Tensors, variables: Sequence[Variable]) -> tuple[Any, list[tuple[Variable, Tensor]]]:
    """Calls `fn` on the values of its tensors and of variables; also returns the values that it assigns."""
    count = len(values) - len(variables)
    bindings = zip(variables, values[count:], strict=True)
    with parameters_made(), Scope(bindings, creates=True) as scope, modules_read_variables:
        result = fn(*values[:count])
    if scope.incomplete:
        return _called(fn, values, variables)
    return result, [(variable, scope.get_current_value(variable)) for variable in scope.written]


def _copy(tensor: Tensor, keep: bool) -> Tensor:
    """The same values as another tensor: only uses of that are differentiated.

    With `keep`, an enclosing function is differentiated through it too.
    """
    return tensor.view_as(tensor) if keep and tensor.requires_grad else tensor.detach().requires_grad_()


class _Twice(torch.autograd.Function):
    """See `Backend.term_twice`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(term: Tensor, _: Callable[[], None]) -> tuple[Tensor, Tensor]:
        return term.clone(), term.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.included = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_first: Tensor | None, of_second: Tensor | None) -> tuple[Tensor | None, None]:
        if of_first is None:
            return of_second, None
        ctx.included()
        return of_first, None


def _gradient(value: Tensor, sources: list[Tensor], *, keep: bool) -> Gradients:
    return list(torch.autograd.grad(value, sources, allow_unused=True, create_graph=keep))


def _jacobian(output: Tensor, sources: list[Tensor], *, keep: bool) -> Gradients:
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device).reshape(-1, *output.shape)
    options = {"allow_unused": True, "retain_graph": True, "create_graph": keep}
    columns = torch.autograd.grad(output, sources, basis, is_grads_batched=True, **options)
    return [None if column is None else column.reshape(output.shape + column.shape[1:]) for column in columns]


def _reached(value: Tensor, sources: list[Tensor], derivative: Callable[..., Gradients]) -> Gradients:
    """Derivatives with respect to the sources that reach the value; `None` for the others."""
    ends = _ends(value)
    reached = [source for source in sources if (source.grad_fn or id(source)) in ends]
    found = dict(zip(map(id, reached), derivative(value, reached), strict=True)) if reached else {}
    return [found.get(id(source)) for source in sources]


# Their derivative is zero on torch and `None` on the other backends.
_WITHOUT_GRADIENT = {f"{name}Backward" for name in ("Ceil", "Floor", "Round", "Sign", "Trunc")}


def _ends(value: Tensor) -> set[Any]:
    """All nodes of autograd below a value, and the ids of its leaves."""
    nodes = reached([value.grad_fn] if value.grad_fn is not None else [], _followed)
    return {id(value), *nodes, *(id(node.variable) for node in nodes if hasattr(node, "variable"))}


def _followed(node: Any) -> list[Any]:
    without_gradient = node.name().rstrip("0123456789") in _WITHOUT_GRADIENT
    return [] if without_gradient else [after for after, _ in node.next_functions if after is not None]


backend = TorchBackend()
