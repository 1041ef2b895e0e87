"""JAX: a step as one jitted pure function of its variables' values, which donates those that it writes.

Internals used: `Variable._value` (see `handloom/_keras.py`); `subjaxprs` and, to distinguish traces,
`get_opaque_trace_state` of `jax.extend.core`, or, before JAX 0.10, of `jax.core`; `source_info`, the lines of an
operation; `Compiled._call`, the executable without its Python wrapper; CPython's reference counts, which show that
others hold an array too.
"""

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, Self, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from handloom._keras import Tensor, Tensors, Variable, Variables, stored_value
from handloom._util.source_line import Frames
from handloom.backends.dependencies import Dependencies
from handloom.backends.program import Cost, Fused, Program, Step, Tracing, Untraceable
from handloom.backends.scope import Recorder, Scope, refuse
from handloom.backends.trace_errors import leaked
from handloom.errors import VariableError

MARK = "handloom: "

Pure: TypeAlias = Callable[[Tensors, Tensors, Tensors], list[Tensor]]
"""A step without side effects: (written values, read values, tensors) -> [*new written values, *results]."""


class JaxProgram(Program):
    """A step, traced and compiled.

    Args:
        fn: The step.
        tensors: One set of arguments.
        tracing: Makes the context in which the step is traced.
    """

    def __init__(self, fn: Step, tensors: Tensors, tracing: Tracing) -> None:
        self._fn, self._tensors, self._tracing = fn, tensors, tracing
        with tracing():
            written, read = find_variables(fn, tensors)
            self.written, self.read = tuple(written), tuple(read)
            self._executable = _Executable(_pure(fn, written, read), tensors, self.written, self.read)
        self.dependencies = _dependencies(self._executable.jaxpr, len(written) + len(read))
        self._call = self._executable.bound()

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return self._call(tensors)

    def pure(self, written: Tensors, read: Tensors, tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        copies = list(map(jnp.array, written))  # They are donated.
        returned = self._executable.compiled(copies, list(read), tuple(tensors))
        return returned[: len(written)], returned[len(written) :]

    def fused(self, steps: int) -> Fused:
        if not all(isinstance(tensor, (jax.Array, np.ndarray, np.generic)) for tensor in self._tensors):
            raise Untraceable("sparse batches have no common shape")
        stacked = [jax.ShapeDtypeStruct((steps, *tensor.shape), tensor.dtype) for tensor in self._tensors]
        with self._tracing():
            pure = functools.partial(_repeated, _pure(self._fn, self.written, self.read), steps)
            run = _Executable(pure, stacked, self.written, self.read).bound()
        return lambda batches: run(list(map(_stacked, zip(*batches, strict=True))))

    def cost(self) -> Cost:
        found, memory = self._executable.compiled.cost_analysis() or {}, self._executable.compiled.memory_analysis()
        peak = None
        if memory is not None:
            aliased = memory.alias_size_in_bytes
            peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - aliased
        return Cost(found.get("flops"), found.get("bytes accessed"), peak)


class _Executable:
    """A pure function, compiled for the values of its variables."""

    def __init__(self, pure: Pure, tensors: Sequence[Any], written: Variables, read: Variables) -> None:
        self._written, self._read = written, read
        values = [variable._value for variable in written], [variable._value for variable in read]
        traced = jax.jit(pure, donate_argnums=0).trace(*values, tuple(tensors))
        self.jaxpr = traced.jaxpr.jaxpr
        foreign = len(self.jaxpr.invars) - len(written) - len(read) - len(jax.tree.leaves(tensors))
        if foreign:
            raise leaked(_frames_of_first_use(self.jaxpr, self.jaxpr.invars[:foreign]))
        self.compiled = traced.lower().compile()

    def bound(self) -> Callable[[Tensors], list[Tensor]]:
        """A function that runs it on the variables themselves; see `Program.__call__`."""
        written, read, compiled = self._written, self._read, self.compiled
        native: Callable[..., list[Tensor]] | None = None

        def run(tensors: Tensors) -> list[Tensor]:
            nonlocal native
            values = [variable._value for variable in written]
            if native is None:
                # The first call goes through Python code, which an interrupt can stop anywhere, so copies are donated.
                # After an interrupt, all later calls would go there too, if `_call` were not reset.
                values, compiled._call = jax.device_put(values, may_alias=False), None
            elif values and max(map(sys.getrefcount, values)) > _HELD_BY_VARIABLE:
                values = _unshared(values)
            arguments = (values,), ([variable._value for variable in read],), (tuple(tensors),)
            # The executable deletes the donated values. One call runs it and stores its results in the variables,
            # without Python code in between that an interrupt could stop.
            returned = chain.from_iterable(map(native or compiled, *arguments))
            deque(map(setattr, written, repeat("_value"), returned), maxlen=0)
            results = list(returned)
            if native is None and isinstance(compiled._call, _NATIVE):
                native = compiled._call
            return results

        return run


def _frames_of_first_use(jaxpr: Any, values: Sequence[Any]) -> Frames:
    """The lines that led to the first operation on some values of a program, the outermost first."""
    ids = set(map(id, values))
    uses = (equation for equation in jaxpr.eqns if not ids.isdisjoint(map(id, equation.invars)))
    stacks = (equation.source_info.traceback for equation in uses)
    frames = next((stack.frames for stack in stacks if stack is not None), ())
    return [(frame.file_name, frame.line_num) for frame in reversed(frames)]


_NATIVE = type(jax.jit(lambda: None))


def _unshared(values: list[Tensor]) -> list[Tensor]:
    """The same values, copied if another variable (after `a.assign(b)`) or the user holds the array too.

    A donated array is deleted for all holders.
    """
    return [jnp.copy(value) if sys.getrefcount(value) > _HELD_BY_VARIABLE + 1 else value for value in values]


def _references_of_a_variables_value() -> int:
    holder = [[object()]]
    return max(map(sys.getrefcount, [value[0] for value in holder]))


_HELD_BY_VARIABLE = _references_of_a_variables_value()


def _pure(fn: Step, written: Variables, read: Variables) -> Pure:
    def pure(written_values: Tensors, read_values: Tensors, tensors: Tensors) -> list[Tensor]:
        bindings = zip([*written, *read], [*written_values, *read_values], strict=True)
        with OneTrace(bindings, outer=refuse) as scope:
            results = list(fn(*tensors))
        return [*(scope.get_current_value(variable) for variable in written), *results]

    return pure


def _repeated(pure: Pure, steps: int, written: Tensors, read: Tensors, stacked: Tensors) -> list[Tensor]:
    """Runs a step on each slice of tensors along their first axis; returns the results of the last."""

    def step(values: Tensors, tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        returned = pure(values, read, tensors)
        news = [jnp.asarray(new, old.dtype) for new, old in zip(returned, values, strict=False)]
        return news, returned[len(written) :]

    unroll = False
    if jax.default_backend() == "cpu":  # There, XLA's convolutions are several times slower inside a loop.
        one = jax.make_jaxpr(pure)(written, read, tuple(tensor[0] for tensor in stacked))
        unroll = "conv_general_dilated" in _primitives(one.jaxpr)
    news, results = jax.lax.scan(step, list(written), tuple(stacked), steps, unroll=unroll)
    return [*news, *(result[-1] for result in results)]


def _primitives(jaxpr: Any) -> set[str]:
    """The names of all operations, with those in branches, loops and functions."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    inside = jax.tree.leaves([equation.params for equation in jaxpr.eqns])
    return names.union(*(_primitives(leaf) for leaf in inside if hasattr(leaf, "eqns")))


def _stacked(tensors: Tensors) -> Tensor:
    return (np if all(isinstance(tensor, np.ndarray) for tensor in tensors) else jnp).stack(tensors)


def _dependencies(jaxpr: Any, variables: int) -> Dependencies:
    """The nodes are the values in the program, except constants."""
    users: dict[int, list[Any]] = {}
    for equation in jaxpr.eqns:
        for value in equation.invars:
            users.setdefault(id(value), []).append(equation)
    returned = set(map(id, jaxpr.outvars))

    def users_of(value: Any) -> Sequence[Any]:
        return users.get(id(value), ())

    return Dependencies(
        _marks(jaxpr),
        jaxpr.invars[variables:],
        following=lambda value: [result for equation in users_of(value) for result in equation.outvars],
        is_end=lambda value: id(value) in returned or any(equation.effects for equation in users_of(value)),
    )


def _marks(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name", ""))
        if equation.primitive.name == "name" and name.startswith(MARK):
            yield name.removeprefix(MARK), equation.outvars[0]


def find_variables(fn: Step, tensors: Tensors) -> tuple[list[Variable], list[Variable]]:
    """Runs a step on shapes alone; returns the variables that it writes, and those that it only reads."""
    recorder, written = Recorder(stored_value), list[Variable]()

    def run(*tensors: Tensor) -> list[Tensor]:
        with OneTrace(outer=recorder) as scope:
            results = list(fn(*tensors))
        written.extend(scope.written)
        return results

    with Scope(creates=True):
        jax.eval_shape(run, *tensors)
    known = set(map(id, written))
    return written, [variable for variable in recorder.variables if id(variable) not in known]


trace_state = getattr(jax.extend.core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state


class OneTrace(Scope):
    """Refuses assignments inside an inner trace, such as that of a loop, which loses them."""

    def __enter__(self) -> Self:
        super().__enter__()
        self._trace = trace_state()
        return self

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        if trace_state() != self._trace:
            raise VariableError(
                f"HL101: The variable {update[0].path!r} is assigned inside a function that was passed to an operation "
                "(keras.ops.while_loop, fori_loop, scan, map, vectorized_map).",
                "On JAX, the new value cannot leave that function.",
                "Return the new value from it, and assign it outside. For example: "
                "v.assign(ops.fori_loop(0, 3, lambda index, value: value + index, v.value)).",
            )
        super().add_update(update)
