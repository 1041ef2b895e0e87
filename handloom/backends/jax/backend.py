"""JAX: a step becomes one pure function of its variables' values, jitted, its written state donated.

Internals used: `Variable._value` (see `handloom/_keras.py`); while tracing, the check by which `keras.random` refuses
to draw unseeded numbers under a trace (it guards against a seed frozen into the program; here the global seed
generator's state is captured like any other variable, so nothing freezes); of `jax.extend.core`, `jaxpr_as_fun`, to
take several derivatives of one run, and `get_opaque_trace_state`, which tells one trace from another; `Compiled._call`,
the executable without its Python wrapper; CPython's reference counts, which tell an array that others hold too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.sparse import BCOO
from keras.src.random import seed_generator

from handloom._interop.onnx_jax import pool_over_few_axes
from handloom._keras import Tensor, Variable, current_value, keras, stored_value
from handloom.backends.base import Backend, Gradients, Program, Repeated, Untraceable
from handloom.backends.jax.control_flow import assignments_in_branches, cond
from handloom.backends.scope import Recorder, Scope, refuse
from handloom.backends.source_line import (
    frames_of,
    naming_what_has_no_derivative,
    needs_a_value,
    tensorflow_called,
    users_line,
)
from handloom.errors import TraceError, VariableError


class JaxBackend(Backend):
    name = "jax"

    def is_array(self, leaf: Any) -> bool:
        return isinstance(leaf, (jax.Array, np.ndarray, np.generic, BCOO))

    def to_tensor(self, array: Any) -> Tensor:
        if isinstance(array, BCOO):
            return _padded(array)
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array

    def sparse_tensor(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        return self.to_tensor(BCOO((jnp.asarray(values), jnp.asarray(indices, np.int32)), shape=shape))

    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        kind = f"sparse, {tensor.nse} stored, " if isinstance(tensor, BCOO) else ""
        return tensor.shape, kind + jax.dtypes.canonicalize_dtype(tensor.dtype).name

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        return np.asarray(tensor)

    def detach(self, tensor: Tensor) -> Tensor:
        return tensor

    def trace(
        self,
        fn: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        *,
        jit_compile: bool | str,
        unused: Callable[[str], None] = lambda _: None,
    ) -> Program | None:
        if not self.compiles_kernels(jit_compile):
            return None
        try:
            with self._inside("trace"), _unseeded_random_ops():
                written, read = _find_variables(fn, tensors)
                return _program(_pure(fn, written, read), tensors, written, read, unused)
        except _NEEDS_A_VALUE as error:
            frames = frames_of(error)
            raise tensorflow_called(frames, self.name) or needs_a_value(frames) from error
        except jax.errors.UnexpectedTracerError as error:
            raise _leaked(users_line(frames_of(error))) from error

    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        return jit_compile is not False

    def repeat(
        self,
        program: Program,
        fn: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        steps: int,
        *,
        jit_compile: bool | str,
    ) -> Repeated:
        del program, jit_compile
        if not all(isinstance(tensor, (jax.Array, np.ndarray, np.generic)) for tensor in tensors):
            raise Untraceable("sparse batches have no common shape")
        stacked = [jax.ShapeDtypeStruct((steps, *tensor.shape), tensor.dtype) for tensor in tensors]
        with self._inside("trace"), _unseeded_random_ops():
            written, read = _find_variables(fn, tensors)
            run = _program(functools.partial(_rolled, _pure(fn, written, read), steps), stacked, written, read)
        return lambda batches: run(list(map(_stacked, zip(*batches, strict=True))))

    def with_control_flow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return assignments_in_branches()(fn)

    def cond(self, pred: Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
        return cond(pred, true_fn, false_fn)

    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        return checkpoint_name(tensor, _MARK + name)

    def profiled(self, directory: Path) -> Any:
        return jax.profiler.trace(directory)

    def fix_onnx(self, graph: Any) -> bool:
        return pool_over_few_axes(graph)

    def create_variables(self, fn: Callable[[], Any]) -> None:
        with self._inside("trace"), _unseeded_random_ops(), Scope(creates=True):
            jax.eval_shape(lambda: [fn()][:0])

    @naming_what_has_no_derivative("JAX")
    def value_and_grad(
        self,
        fn: Callable[..., tuple[Tensor, list[Tensor]]],
        tensors: Sequence[Tensor],
        variables: Sequence[Variable],
    ) -> tuple[Tensor, list[Tensor], Gradients, Gradients]:
        sources, reached = _Sources(tensors, variables), _Reached()

        def pure(*flat: Tensor) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
            (value, aux), news = sources.call(fn, reached.watch(flat))
            return value, (aux, news)

        with self._inside("gradient"), Scope(creates=True) as scope:
            value, pullback, (aux, news) = jax.vjp(pure, *sources.values, has_aux=True)
            gradients = reached.only(pullback(jnp.ones_like(value)))
        if scope.incomplete:
            return self.value_and_grad(fn, tensors, variables)
        sources.write(news)
        return value, aux, *sources.split(gradients)

    @naming_what_has_no_derivative("JAX")
    def jacobian(
        self,
        fn: Callable[..., tuple[list[Tensor], list[Tensor]]],
        tensors: Sequence[Tensor],
        variables: Sequence[Variable],
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[Gradients, Gradients]]]:
        sources = _Sources(tensors, variables)
        with self._inside("gradient"), Scope(creates=True) as scope:
            trace = jax.make_jaxpr(functools.partial(sources.call, fn), return_shape=True)
            closed, shapes = trace(sources.values)
            flat_fn = jax.extend.core.jaxpr_as_fun(closed)
            (outputs, aux), news = jax.tree.unflatten(jax.tree.structure(shapes), flat_fn(*sources.values))
            rows = [_row(flat_fn, index, sources.values) for index in range(len(outputs))]
        if scope.incomplete:
            return self.jacobian(fn, tensors, variables)
        sources.write(news)
        return outputs, aux, [sources.split(row) for row in rows]


def _padded(sparse: BCOO) -> BCOO:
    """The same tensor, with room for a power of two of values, so that batches do not each need a program of their own.

    Where nothing is stored, the index is outside of the tensor, as JAX has it. Always a new object: by type, shape and
    dtype alone, two such tensors cannot be told apart.
    """
    data, indices = sparse.data, sparse.indices
    data = data.astype(keras.config.floatx()) if data.dtype == np.float64 else data
    if not (sparse.n_batch or sparse.n_dense):
        room = (1 << max(sparse.nse - 1, 0).bit_length()) - sparse.nse
        outside = jnp.broadcast_to(jnp.asarray(sparse.shape, indices.dtype), (room, len(sparse.shape)))
        data, indices = jnp.pad(data, (0, room)), jnp.concatenate([indices, outside])
    return BCOO((data, indices), shape=sparse.shape)


_NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


Pure: TypeAlias = Callable[[list[Tensor], list[Tensor], tuple[Tensor, ...]], list[Tensor]]
"""A step without side effects: (written state, read state, tensors) -> [*new written state, *results]."""


def _pure(fn: Callable[..., Sequence[Tensor]], written: list[Variable], read: list[Variable]) -> Pure:
    def pure(written_values: list[Tensor], read_values: list[Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        bindings = zip(written + read, written_values + read_values, strict=True)
        with _OneTrace(bindings, outer=refuse) as scope:
            results = list(fn(*tensors))
        return [*(scope.get_current_value(variable) for variable in written), *results]

    return pure


def _rolled(
    pure: Pure, steps: int, written_values: list[Tensor], read_values: list[Tensor], stacked: tuple[Tensor, ...]
) -> list[Tensor]:
    """Steps one after the other on slices of tensors along their first axis; the results are those of the last."""
    count = len(written_values)

    def step(values: list[Tensor], tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        returned = pure(values, read_values, tensors)
        news = [jnp.asarray(new, old.dtype) for new, old in zip(returned, values, strict=False)]
        return news, returned[count:]

    one = jax.make_jaxpr(pure)(written_values, read_values, tuple(tensor[0] for tensor in stacked))
    # XLA's convolutions are several times slower on a CPU within a loop than without.
    unroll = jax.default_backend() == "cpu" and "conv_general_dilated" in _primitives(one.jaxpr)
    news, results = jax.lax.scan(step, written_values, stacked, steps, unroll=unroll)
    return [*news, *(result[-1] for result in results)]


def _primitives(jaxpr: Any) -> set[str]:
    """The names of all operations, those in branches, loops and functions among them."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    return names.union(*map(_primitives, jax.extend.core.subjaxprs(jaxpr)))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return (np if all(isinstance(tensor, np.ndarray) for tensor in tensors) else jnp).stack(tensors)


def _program(
    pure: Pure,
    tensors: Sequence[Any],
    written: list[Variable],
    read: list[Variable],
    unused: Callable[[str], None] = lambda _: None,
) -> Program:
    """A step as one executable."""
    traced = jax.jit(pure, donate_argnums=0).trace(_values(written), _values(read), tuple(tensors))
    if len(traced.jaxpr.in_avals) > len(written) + len(read) + len(jax.tree.leaves(tensors)):
        raise _leaked("(line unknown)")
    for name in _unused_marks(traced.jaxpr.jaxpr):
        unused(name)
    compiled = traced.lower().compile()
    native: Callable[..., list[Tensor]] | None = None

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        nonlocal native
        values = [variable._value for variable in written]
        if native is None:
            # The first call leads through Python, where an interrupt can come at any point: copies are donated. And
            # after an interrupt all calls would lead there, if the next one did not begin anew.
            values, compiled._call = jax.device_put(values, may_alias=False), None
        elif values and max(map(sys.getrefcount, values)) > _HELD_BY_VARIABLE:
            values = _unshared(values)
        arguments = (values,), ([variable._value for variable in read],), (tuple(tensors),)
        # The donated values are gone once the executable has run. In one call, with no Python in between that an
        # interrupt could stop, it runs and what it returns goes into the variables.
        returned = chain.from_iterable(map(native or compiled, *arguments))
        deque(map(setattr, written, repeat("_value"), returned), maxlen=0)
        results = list(returned)
        if native is None and isinstance(compiled._call, _NATIVE):
            native = compiled._call
        return results

    return run


_NATIVE = type(jax.jit(lambda: None))


_MARK = "handloom: "


def _unused_marks(jaxpr: Any) -> set[str]:
    """The names of marks from which no way leads to what a program returns."""
    needed, marks, used = set(map(id, jaxpr.outvars)), set[str](), set[str]()
    for equation in reversed(jaxpr.eqns):
        is_needed = bool(equation.effects) or any(id(output) in needed for output in equation.outvars)
        needed.update(map(id, equation.invars) if is_needed else ())
        name = str(equation.params.get("name", ""))
        if equation.primitive.name == "name" and name.startswith(_MARK):
            marks.add(name.removeprefix(_MARK))
            used.update([name.removeprefix(_MARK)] if is_needed else [])
    return marks - used


def _values(variables: list[Variable]) -> list[Tensor]:
    return [variable._value for variable in variables]


def _unshared(values: list[Tensor]) -> list[Tensor]:
    """The same values, copied where another variable (after `a.assign(b)`) or the user holds the array too.

    A donated array is gone for everybody; nobody but the program may feel that.
    """
    return [jnp.copy(value) if sys.getrefcount(value) > _HELD_BY_VARIABLE + 1 else value for value in values]


def _references_of_a_variables_value() -> int:
    holder = [[object()]]
    return max(map(sys.getrefcount, [value[0] for value in holder]))


_HELD_BY_VARIABLE = _references_of_a_variables_value()


def _find_variables(
    fn: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
) -> tuple[list[Variable], list[Variable]]:
    """Runs a step on shapes alone: the variables it writes, and those it only reads."""
    recorder, written = Recorder(stored_value), list[Variable]()

    def run(*tensors: Tensor) -> list[Tensor]:
        with _OneTrace(outer=recorder) as scope:
            results = list(fn(*tensors))
        written.extend(scope.written)
        return results

    with Scope(creates=True):
        jax.eval_shape(run, *tensors)
    known = set(map(id, written))
    return written, [variable for variable in recorder.variables if id(variable) not in known]


class _OneTrace(Scope):
    """Refuses what is assigned inside a trace of its own, as that of a loop is: it cannot get out of there."""

    def __enter__(self) -> _OneTrace:
        super().__enter__()
        self._trace = jax.extend.core.get_opaque_trace_state()
        return self

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        if jax.extend.core.get_opaque_trace_state() != self._trace:
            raise VariableError(
                f"The variable {update[0].path!r} is assigned inside a function given to an operation (keras.ops."
                "while_loop, fori_loop, scan, map, vectorized_map), from where its new value cannot get out on JAX. "
                "Return the new value from that function, and assign it outside. For example: "
                "v.assign(ops.fori_loop(0, 3, lambda index, value: value + index, v.value))."
            )
        super().add_update(update)


class _Sources:
    """What a function is differentiated with respect to: tensors, then variables, as one flat list."""

    def __init__(self, tensors: Sequence[Tensor], variables: Sequence[Variable]) -> None:
        self._count = len(tensors)
        self._variables = variables
        self._written: list[Variable] = []
        self.values = [*tensors, *map(current_value, variables)]

    def call(self, fn: Callable[..., Any], flat: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """Calls `fn` with the variables at the given values; also returns the new values of what it wrote."""
        with _OneTrace(zip(self._variables, flat[self._count :], strict=True)) as scope:
            result = fn(*flat[: self._count])
        self._written = scope.written
        return result, [scope.get_current_value(variable) for variable in self._written]

    def write(self, news: Sequence[Tensor]) -> None:
        """Carries what the function wrote outward, once."""
        for variable, new in zip(self._written, news, strict=True):
            variable.assign(new)

    def split(self, gradients: Gradients) -> tuple[Gradients, Gradients]:
        return gradients[: self._count], gradients[self._count :]


class _Reached:
    """Tells a zero gradient from none: notes through which sources differentiation passed.

    Each source goes through an identity whose backward rule takes a note when it is called. JAX calls it only
    if something differentiable leads from the source to the value.
    """

    def __init__(self) -> None:
        self._indices: set[int] = set()

    def watch(self, flat: Sequence[Tensor]) -> list[Tensor]:
        return [_noted(functools.partial(self._indices.add, index), value) for index, value in enumerate(flat)]

    def only(self, gradients: Sequence[Tensor]) -> Gradients:
        return [gradient if index in self._indices else None for index, gradient in enumerate(gradients)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _noted(note: Callable[[], None], value: Tensor) -> Tensor:
    del note  # Called by the backward rule alone.
    return value


def _noted_forward(note: Callable[[], None], value: Tensor) -> tuple[Tensor, None]:
    del note
    return value, None


def _noted_backward(note: Callable[[], None], _: None, gradient: Tensor) -> tuple[Tensor]:
    note()
    return (gradient,)


_noted.defvjp(_noted_forward, _noted_backward)


def _row(flat_fn: Callable[..., list[Tensor]], index: int, values: Sequence[Tensor]) -> Gradients:
    """The derivatives of one output with respect to each source."""
    reached = _Reached()
    output, pullback = jax.vjp(lambda *flat: flat_fn(*reached.watch(flat))[index], *values)
    basis = jnp.eye(output.size, dtype=output.dtype).reshape(output.size, *output.shape)
    columns = jax.vmap(pullback)(basis)
    return reached.only([column.reshape(output.shape + column.shape[1:]) for column in columns])


def _leaked(line: str) -> TraceError:
    return TraceError(
        "A tensor of a function that was given to an operation (keras.ops.cond, while_loop, scan, map, vectorized_map) "
        f"is used outside of that function, where it has no meaning:\n    {line}\n"
        "Return it from the function instead."
    )


@contextlib.contextmanager
def _unseeded_random_ops() -> Iterator[None]:
    """Lets `keras.random.normal(shape)` draw from the global seed generator while a step is traced."""
    check = seed_generator.jax_utils
    seed_generator.jax_utils = _NoTracingCheck
    try:
        yield
    finally:
        seed_generator.jax_utils = check


class _NoTracingCheck:
    @staticmethod
    def is_in_jax_tracing_scope(x: Any = None) -> bool:
        del x
        return False


backend = JaxBackend()
