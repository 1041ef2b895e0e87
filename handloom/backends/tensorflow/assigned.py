"""TensorFlow: gradients through variables that a differentiated function assigns.

A tape knows a variable by its handle. It does not see that a later read depends on an assigned tensor. This module
tells it: in eager execution an assignment gives the variable a new handle; in a graph, where a new handle would lose
the order of reads and writes, each later read is recorded as a read of the assigned tensor. Values always come from
the variable. An assignment in the graph of a branch or loop counts in that graph only.

Internals used: `BaseResourceVariable` and `_UnreadVariable` (the result of an assignment), their `_read_variable_op`,
`sparse_read`, `gather_nd`, `assign`, `assign_add` and `assign_sub`, through which all reads in graphs and all
assignments go, and that `ResourceVariable` wraps the last three; `_handle`, which eager operations read directly;
`_should_act_as_resource_variable`, which makes a tape treat an object as a variable; `record`, to tell tapes;
`ControlFlowFuncGraph`, to distinguish the graph of a branch or loop from that of a `tf.function`, which may be called
again elsewhere.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.ops import resource_variable_ops
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph

from handloom._keras import Tensor
from handloom._util.patch import Patch
from handloom._util.switch import Switch

_BaseVariable, _UnreadVariable = resource_variable_ops.BaseResourceVariable, resource_variable_ops._UnreadVariable


class _Assigned:
    """The tensors that a differentiated function, with all functions inside it, has assigned."""

    def __init__(self) -> None:
        self._is_eager = tf.executing_eagerly()
        self._values: dict[tuple[Any, Any], Tensor] = {}
        self._handles: dict[int, tuple[Any, Tensor]] = {}

    def note(self, variable: Any, value: Tensor) -> None:
        if not tf.executing_eagerly():
            self._values[_graph(), variable.handle.ref()] = value
        elif self._is_eager:  # Not for a trace that assigns outside of its graph: there handles must stay.
            self._handles.setdefault(id(variable), (variable, variable.handle))
            variable._handle = _new_handle(variable.handle, value)

    def value(self, variable: Any) -> Tensor | None:
        """The tensor that was assigned last, if the graph that reads knows it."""
        if not self._values or tf.executing_eagerly():
            return None
        graph, handle = _graph(), variable.handle.ref()
        while (graph, handle) not in self._values and isinstance(graph, ControlFlowFuncGraph):
            graph = graph.outer_graph
        return self._values.get((graph, handle))

    def restore(self) -> None:
        for variable, handle in self._handles.values():
            variable._handle = handle


_present: Switch[_Assigned | None] = Switch(None)


@contextlib.contextmanager
def assignments_noted() -> Iterator[None]:
    """A block in which gradients flow through assigned variables; nested blocks share their records."""
    if _present.get() is not None:
        yield
        return
    assigned = _Assigned()
    try:
        with _patch, _present.here(assigned):
            yield
    finally:
        assigned.restore()


@dataclasses.dataclass(frozen=True)
class _Handle:
    """A variable by its present handle, in a form that a tape treats as a variable."""

    handle: Tensor
    shape: tf.TensorShape
    _should_act_as_resource_variable = True


def watch(tape: tf.GradientTape, variable: Any) -> Any:
    """Makes a tape watch a variable; returns the source to differentiate with respect to."""
    source = variable
    if isinstance(variable, _BaseVariable) and _value_assigned_to(variable) is not None:
        source = tf.identity(variable)
        _note(variable, source)
    tape.watch(source)
    return _Handle(source.handle, source.shape) if isinstance(source, _BaseVariable) else source


def _note(variable: Any, value: Tensor) -> None:
    if assigned := _present.get():
        assigned.note(variable, value)


def _value_assigned_to(variable: Any) -> Tensor | None:
    assigned = _present.get()
    return assigned and assigned.value(variable)


def _is_noted(variable: Any) -> bool:
    """Whether gradients can flow through assignments of a variable."""
    return _present.get() is not None and (variable.dtype.is_floating or variable.dtype.is_complex)


def _graph() -> Any:
    return tf.compat.v1.get_default_graph()


def _new_handle(handle: Tensor, value: Tensor) -> Tensor:
    """Another handle of the same variable; for tapes, it is computed from a value."""
    with record.stop_recording():
        new = tf.identity(handle)
    record.record_operation(_READ, [new], [value], lambda gradient: [gradient])
    return new


_READ = "HandloomReadOfAssigned"


# In a branch or loop, the gradient of `_read_as` goes through operations, not tapes.
tf.RegisterGradient(_READ)(lambda _, gradient, __: [None, gradient])


def _read_as(value: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """The result of a read; for tapes, it is a value."""
    with record.stop_recording(), _graph().gradient_override_map({"IdentityN": _READ}):
        result, _ = tf.identity_n([read(), value])
    record.record_operation(_READ, [result], [value], lambda gradient: [gradient])
    return result


def _reads(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def read(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = _value_assigned_to(self)
        if value is None:
            return original(self, *args, **kwargs)
        return _read_as(value, lambda: original(self, *args, **kwargs))

    return read


def _looks_up(look_up: Callable[..., Tensor], original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def read(self: Any, indices: Tensor, name: str | None = None) -> Tensor:
        if _value_assigned_to(self) is None:
            return original(self, indices, name)
        return look_up(self.value(), indices, name=name)

    return read


def _assigns(original: Callable[..., Any]) -> Callable[..., Any]:
    def assign(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_noted(self):
            return original(self, value, *args, **kwargs)
        value = tf.convert_to_tensor(value, dtype=self.dtype)
        result = original(self, value, *args, **kwargs)
        _note(self, value)
        # In eager execution TensorFlow returns the variable with its old handle.
        return self if isinstance(result, _UnreadVariable) and tf.executing_eagerly() else result

    return assign


def _adds(add: Callable[[Tensor, Tensor], Tensor], original: Callable[..., Any]) -> Callable[..., Any]:
    def assign_sum(self: Any, delta: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_noted(self):
            return original(self, delta, *args, **kwargs)
        delta = tf.convert_to_tensor(delta, dtype=self.dtype)
        return self.assign(add(tf.convert_to_tensor(self), delta), *args, **kwargs)

    return assign_sum


_ASSIGNMENTS: dict[str, Callable[..., Any]] = {
    "assign": _assigns,
    "assign_add": functools.partial(_adds, tf.add),
    "assign_sub": functools.partial(_adds, tf.subtract),
}

_patch = Patch(
    (_BaseVariable, "_read_variable_op", _reads),
    (_UnreadVariable, "_read_variable_op", _reads),
    (_BaseVariable, "sparse_read", functools.partial(_looks_up, tf.gather)),
    (_BaseVariable, "gather_nd", functools.partial(_looks_up, tf.gather_nd)),
    *((_BaseVariable, *assignment) for assignment in _ASSIGNMENTS.items()),
    *((resource_variable_ops.ResourceVariable, *assignment) for assignment in _ASSIGNMENTS.items()),
)
