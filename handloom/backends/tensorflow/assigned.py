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

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.ops import resource_variable_ops
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph

from handloom._keras import Tensor
from handloom._util.patch import Patch

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


class _Present(threading.local):
    assigned: _Assigned | None = None


_present = _Present()


@contextlib.contextmanager
def assignments_noted() -> Iterator[None]:
    """A block in which gradients flow through assigned variables; nested blocks share their records."""
    if _present.assigned is not None:
        yield
        return
    _present.assigned = assigned = _Assigned()
    try:
        with _patch:
            yield
    finally:
        _present.assigned = None
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
    if _present.assigned is not None:
        _present.assigned.note(variable, value)


def _value_assigned_to(variable: Any) -> Tensor | None:
    return None if _present.assigned is None else _present.assigned.value(variable)


def _is_noted(variable: Any) -> bool:
    """Whether gradients can flow through assignments of a variable."""
    return _present.assigned is not None and (variable.dtype.is_floating or variable.dtype.is_complex)


def _graph() -> Any:
    return tf.compat.v1.get_default_graph()


def _pass_on(gradient: Any) -> list[Any]:
    return [gradient]


def _new_handle(handle: Tensor, value: Tensor) -> Tensor:
    """Another handle of the same variable; for tapes, it is computed from a value."""
    with record.stop_recording():
        new = tf.identity(handle)
    record.record_operation(_READ, [new], [value], _pass_on)
    return new


_READ = "HandloomReadOfAssigned"


def _gradient_in_a_branch(operation: tf.Operation, gradient: Any, _: Any) -> list[Any]:
    """The gradient of `_read_as` inside a branch or loop, whose gradient goes through operations, not tapes."""
    del operation
    return [None, *_pass_on(gradient)]


tf.RegisterGradient(_READ)(_gradient_in_a_branch)


def _read_as(value: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """The result of a read; for tapes, it is a value."""
    with record.stop_recording(), _graph().gradient_override_map({"IdentityN": _READ}):
        result, _ = tf.identity_n([read(), value])
    record.record_operation(_READ, [result], [value], _pass_on)
    return result


def _reads(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def read(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = _value_assigned_to(self)
        if value is None:
            return original(self, *args, **kwargs)
        return _read_as(value, lambda: original(self, *args, **kwargs))

    return read


def _looks_up(look_up: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def read(self: Any, indices: Tensor, name: str | None = None) -> Tensor:
            if _value_assigned_to(self) is None:
                return original(self, indices, name)
            return look_up(self.value(), indices, name=name)

        return read

    return make


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


def _adds(add: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def assign_sum(self: Any, delta: Any, *args: Any, **kwargs: Any) -> Any:
            if not _is_noted(self):
                return original(self, delta, *args, **kwargs)
            delta = tf.convert_to_tensor(delta, dtype=self.dtype)
            return self.assign(add(tf.convert_to_tensor(self), delta), *args, **kwargs)

        return assign_sum

    return make


_patch = Patch(
    (_BaseVariable, "_read_variable_op", _reads),
    (_UnreadVariable, "_read_variable_op", _reads),
    (_BaseVariable, "sparse_read", _looks_up(tf.gather)),
    (_BaseVariable, "gather_nd", _looks_up(tf.gather_nd)),
    *((owner, "assign", _assigns) for owner in (_BaseVariable, resource_variable_ops.ResourceVariable)),
    *((owner, "assign_add", _adds(tf.add)) for owner in (_BaseVariable, resource_variable_ops.ResourceVariable)),
    *((owner, "assign_sub", _adds(tf.subtract)) for owner in (_BaseVariable, resource_variable_ops.ResourceVariable)),
)
