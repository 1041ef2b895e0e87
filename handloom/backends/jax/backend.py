"""JAX: steps become pure functions (see `program.py`), gradients pullbacks (see `gradients.py`).

Internals used: the check by which `keras.random` refuses to draw unseeded numbers during a trace. It prevents a seed
that is a constant of the program; here the state of the global seed generator is captured like any other variable.
"""

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.sparse import BCOO
from keras.src.random import seed_generator

from handloom._keras import Tensor, Tensors, Variable, keras
from handloom._util.patch import Patch
from handloom._util.source_line import frames_of
from handloom.backends.base import Backend, Derivatives, Outputs
from handloom.backends.building import built_outside
from handloom.backends.jax.control_flow import assignments_in_branches, cond
from handloom.backends.jax.gradients import Sources, gradients_of_one, rows_of_each, term_twice
from handloom.backends.jax.program import MARK, JaxProgram, trace_state
from handloom.backends.jax.stateful_steps import on_variables
from handloom.backends.program import Program, Seen, Step
from handloom.backends.scope import Scope
from handloom.backends.takes_data import takes
from handloom.backends.trace_errors import leaked, needs_a_value, read_while_differentiated, tensorflow_called

_unseeded_random_ops = Patch(
    (seed_generator, "jax_utils", lambda _: SimpleNamespace(is_in_jax_tracing_scope=lambda *_: False))
)
"""Inside, `keras.random.normal(shape)` can draw from the global seed generator while a step is traced."""


class JaxBackend(Backend):
    name, title, tested = "jax", "JAX", ("0.8", "0.12")
    outside = staticmethod(jax.ensure_compile_time_eval)
    in_steps = Patch(built_outside(jax.ensure_compile_time_eval))  # Operators promote as they are.

    def is_array(self, leaf: Any) -> bool:
        return isinstance(leaf, (jax.Array, np.ndarray, np.generic, BCOO))

    def to_tensor(self, array: Any) -> Tensor:
        if isinstance(array, BCOO):
            return _padded(array)
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if _is_on_another_device(array):
            array = jax.device_put(array, _default_device())
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array

    def placement(self, tensor: Tensor) -> Hashable:
        spread = isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer)
        return tensor.sharding if spread and len(tensor.sharding.device_set) > 1 else None

    def sparse_tensor(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        return self.to_tensor(BCOO((jnp.asarray(values), jnp.asarray(indices, np.int32)), shape=shape))

    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        kind = f"sparse, {tensor.nse} stored, " if isinstance(tensor, BCOO) else ""
        return tensor.shape, kind + jax.dtypes.canonicalize_dtype(tensor.dtype).name

    def key(self, leaf: Any) -> Hashable:
        return leaf.shape, leaf.dtype, type(leaf), getattr(leaf, "sharding", None)

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        return np.asarray(tensor)

    def detach(self, tensor: Tensor) -> Tensor:
        return tensor

    def _program(self, fn: Step, tensors: Tensors, seen: Seen, kernels: bool) -> Program | None:
        try:
            return JaxProgram(fn, tensors, self._tracing) if kernels else None
        except jax.errors.UnexpectedTracerError as error:
            raise leaked(frames_of(error)) from error
        except Exception as error:
            if not _needs_a_value(error):
                raise
            frames = frames_of(error)
            raise tensorflow_called(frames, self.name) or needs_a_value(frames) from error

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        with self._in_trace.here(True), _unseeded_random_ops, self.in_steps:
            yield

    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        return jit_compile is not False

    def with_control_flow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return assignments_in_branches(fn)

    def cond(self, pred: Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
        return cond(pred, true_fn, false_fn)

    def step_of(self, model: keras.Model, name: str, build: Callable[[keras.Model, Any], None]) -> Callable[..., Any]:
        step = getattr(model, name)
        if takes(step, 1) or not takes(step, 2):
            return super().step_of(model, name, build)

        def step_on_data(data: Any) -> Any:
            build(model, data)
            return on_variables(model, step, data)

        step_on_data.__name__ = name
        return step_on_data

    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        return checkpoint_name(tensor, MARK + name)

    def profiled(self, directory: Path) -> Any:
        return jax.profiler.trace(directory)

    def _run_on_shapes(self, fn: Callable[[], Any]) -> None:
        with self._tracing(), Scope(creates=True):
            jax.eval_shape(lambda: [fn()][:0])

    def _derivatives(self, fn: Outputs, tensors: Tensors, variables: Sequence[Variable], scalar: bool) -> Derivatives:
        sources = Sources(tensors, variables)
        try:
            with self._differentiating(), Scope(creates=True) as scope:
                outputs, aux, news, rows = (gradients_of_one if scalar else rows_of_each)(fn, sources)
        except Exception as error:
            if not _needs_a_value(error):
                raise
            frames = frames_of(error)
            raise tensorflow_called(frames, self.name) or read_while_differentiated(frames, self.title) from error
        if scope.incomplete:
            return self._derivatives(fn, tensors, variables, scalar=scalar)
        sources.write(news)
        return outputs, aux, rows

    def _twice(self, term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
        return term_twice(term, included)

    @property
    def _branch(self) -> Any:
        return trace_state()


def _default_device() -> Any:
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def _is_on_another_device(array: Any) -> bool:
    """Whether an array is on one device that is not the default, on which variables are created."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return False
    devices = array.sharding.device_set
    return len(devices) == 1 and _default_device() not in devices


def _padded(sparse: BCOO) -> BCOO:
    """The same tensor, padded to a power of two of values, so that few programs serve all batches.

    Unused indices are outside of the tensor, as is usual on JAX. The result is always a new object: type, shape and
    dtype do not distinguish two such tensors.
    """
    data, indices = sparse.data, sparse.indices
    data = data.astype(keras.config.floatx()) if data.dtype == np.float64 else data
    if not (sparse.n_batch or sparse.n_dense):
        room = (1 << max(sparse.nse - 1, 0).bit_length()) - sparse.nse
        outside = jnp.broadcast_to(jnp.asarray(sparse.shape, indices.dtype), (room, len(sparse.shape)))
        data, indices = jnp.pad(data, (0, room)), jnp.concatenate([indices, outside])
    return BCOO((data, indices), shape=sparse.shape)


def _needs_a_value(error: Exception) -> bool:
    """Whether an error says that Python needs a value that a tensor does not have."""
    return isinstance(error, _NEEDS_A_VALUE) or (
        isinstance(error, (AttributeError, TypeError)) and _HAS_NO_VALUE.search(str(error)) is not None
    )


_HAS_NO_VALUE = re.compile(r"Tracer'?( object)? has no attribute '?numpy|unsupported format string passed to \w*Tracer")

_NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

backend = JaxBackend()
