"""Observers of Keras while a function is traced or a step runs.

Users register no variables, metrics or losses with Handloom, so it observes Keras. Inside `with observing(observer)`,
Keras calls the methods below for everything that happens in this thread. No other module watches Keras.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from handloom._keras import Layer, Tensor, Variable, keras, python_utils, trained_by
from handloom._trace.left_out import passed_over
from handloom._util.patch import Patch
from handloom._util.switch import Switch
from handloom.backends.building import is_building

T = TypeVar("T")


class Observer:
    """Methods that are called when something happens inside Keras; by default they do nothing.

    Attributes:
        sees_building: Whether they are called, too, while a function runs only to build its layers.
    """

    sees_building = False

    def created(self, variable: Variable) -> None:
        """A variable is about to be created."""

    def read(self, variable: Variable) -> None:
        """The value of a variable is about to be read."""

    def assigned(self, variable: Variable) -> None:
        """A variable is about to be assigned."""

    def metric_updated(self, metric: keras.Metric) -> None:
        """The state of a metric is about to be updated."""

    def metric_result(self, metric: keras.Metric, result: Any) -> Any:
        """A metric has returned its result; returns the result for the caller."""
        return result

    def metric_state_read(self, variable: Variable, value: Tensor) -> Tensor:
        """A variable of a metric has been read, but not by the metric itself; returns its value for the caller."""
        return value

    def unpacked(self, data: Any, parts: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """`keras.utils.unpack_x_y_sample_weight` has unpacked data, in a default step too; returns the parts."""
        return parts

    def loss_called(self, loss: keras.Loss, value: Tensor, y_pred: Any, sample_weight: Any) -> None:
        """A Keras loss has been computed."""

    def loss_added(self, layer: Layer, loss: Any) -> None:
        """A layer has added one loss or several."""

    def penalty_read(self, source: Any, penalty: Tensor) -> Tensor:
        """One of the losses of a layer has been read; returns it for the caller.

        Args:
            source: The regularized variable, or the loss as it was added.
            penalty: The regularization, or the loss.
        """
        return penalty

    def layer_called(self, layer: Layer, outputs: Any) -> None:
        """A layer that no other layer called has returned its outputs."""

    def mask_computed(self, layer: Layer, mask: Tensor) -> Tensor:
        """The step has computed a mask by `layer.compute_mask`; returns the mask for the caller."""
        return mask

    def differentiates(self) -> None:
        """A function is about to be differentiated."""

    def differentiated(self, value: Tensor) -> None:
        """A value has been differentiated."""

    def applied(self, optimizer: keras.Optimizer, variables: Sequence[Variable]) -> None:
        """An optimizer is about to update variables."""

    def accumulated(self, optimizer: keras.Optimizer) -> None:
        """An optimizer has added gradients to those of earlier steps."""


_observers: Switch[tuple[Observer, ...]] = Switch(())
_calls = Switch(0)
_in_metric = Switch(False)


@contextlib.contextmanager
def observing(*observers: Observer) -> Iterator[None]:
    """Calls observers for a block, along with those of enclosing blocks."""
    with _PATCH, _observers.here((*_observers.get(), *observers)):
        yield


def building() -> contextlib.AbstractContextManager[None]:
    """A block in which a function runs only to build its layers: most observers are not called."""
    return _observers.here(tuple(observer for observer in _observers.get() if observer.sees_building))


def unobserved() -> contextlib.AbstractContextManager[None]:
    """A block that is no part of what runs around it: no observer is called."""
    return _observers.here(())


def innermost(kind: type[T]) -> T | None:
    """The observer of a class that was added last; `None` if there is none."""
    return next((observer for observer in reversed(_observers.get()) if isinstance(observer, kind)), None)


def tell(event: str, *about: Any) -> None:
    """Calls a method of each observer."""
    for observer in _observers.get():
        getattr(observer, event)(*about)


def _replaced(event: str, about: Any, value: Any) -> Any:
    """Calls a method of each observer that returns a value in place of another."""
    for observer in _observers.get():
        value = getattr(observer, event)(about, value)
    return value


class OwnVariable(keras.Variable):
    """A variable that belongs to Handloom. It may be created at any time."""


class VariableUse(Observer):
    """Observes which Keras variables are created, read and assigned.

    Attributes:
        made: The variables created, in order, without Handloom's own.
        known: The variables read or assigned, by id, with Handloom's own.
        touched: The same without Handloom's own.
        written: The variables assigned, without Handloom's own and without those that an optimizer updates in place.
    """

    sees_building = True

    def __init__(self) -> None:
        self.made: list[Variable] = []
        self.known: dict[int, Variable] = {}
        self.touched: dict[int, Variable] = {}
        self.written: dict[int, Variable] = {}

    def created(self, variable: Variable) -> None:
        if not isinstance(variable, OwnVariable):
            self.made.append(variable)

    def read(self, variable: Variable) -> None:
        self.known[id(variable)] = variable
        if not isinstance(variable, OwnVariable):
            self.touched[id(variable)] = variable

    def assigned(self, variable: Variable) -> None:
        self.read(variable)
        if not isinstance(variable, OwnVariable):
            self.written[id(variable)] = variable


class _FirstValues(Observer):
    sees_building = True

    def __init__(self) -> None:
        self.values: dict[int, tuple[Variable, Tensor]] = {}

    def assigned(self, variable: Variable) -> None:
        if id(variable) not in self.values:
            self.values[id(variable)] = variable, keras.ops.copy(variable.value)


@contextlib.contextmanager
def assignments_undone() -> Iterator[None]:
    """Restores the variables that are assigned inside the block."""
    first = _FirstValues()
    with observing(first):
        yield
    for variable, value in first.values.values():
        variable.assign(value)


# ------------------------------------------------------------------ replacements of methods of Keras


def _creation(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Variable, initializer: Any, shape: Any = None, dtype: Any = None, *args: Any, **rest: Any) -> None:
        if _is_known(initializer):
            shape, dtype, initializer = _as_initializer(initializer, dtype)
        tell("created", self)
        original(self, initializer, shape, dtype, *args, **rest)

    return init


def _is_known(value: Any) -> bool:
    """Whether the first value of a variable consists of numbers and NumPy arrays."""
    kinds = (np.ndarray, np.generic, bool, int, float, complex)
    return all(isinstance(leaf, kinds) for leaf in keras.tree.flatten(value))


def _as_initializer(value: Any, dtype: Any) -> tuple[tuple[int, ...], Any, Callable[..., Tensor]]:
    """Shape, dtype and initializer for a known value: in a trace, Keras creates variables from initializers only."""
    convert = keras.ops.convert_to_tensor
    return np.shape(value), dtype or convert(value).dtype, lambda _, dtype: convert(value, dtype=dtype)


def _telling_before(event: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a method, or the getter of a property, by one that first calls the observers with its object."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_building():
            tell(event, self)
        return original(self, *args, **kwargs)

    return call


def is_of_metric(variable: Variable) -> bool:
    """Whether a variable is that of a metric: only these are added up over replicas."""
    return bool(variable.aggregation == "sum")


def _reading(original: Callable[[Variable], Tensor]) -> Callable[[Variable], Tensor]:
    read = _telling_before("read", original)

    def value(self: Variable) -> Tensor:
        from_outside = is_of_metric(self) and not _in_metric.get() and not is_building()
        return _replaced("metric_state_read", self, read(self)) if from_outside else read(self)

    return value


def _metric_attribute(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def look_up(self: keras.Metric, name: str) -> Any:
        method = original(self, name)
        if name not in ("update_state", "result"):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "update_state":
                tell("metric_updated", self)
            with _in_metric.here(True):
                value = method(*args, **kwargs)
            return _replaced("metric_result", self, value) if name == "result" else value

        return call

    return look_up


_unpack = keras.utils.unpack_x_y_sample_weight
_original_unpack = types.FunctionType(_unpack.__code__, _unpack.__globals__)


def unpacked(data: Any) -> Any:
    """What `keras.utils.unpack_x_y_sample_weight` does where it is observed."""
    return _replaced("unpacked", data, _original_unpack(data))


def _unpacking(_: Callable[..., Any]) -> Callable[..., Any]:
    def unpack_x_y_sample_weight(data: Any) -> Any:
        import sys  # noqa: PLC0415  It runs with the global names of Keras, and without a closure.

        return sys.modules["handloom._trace.observe"].unpacked(data)

    return unpack_x_y_sample_weight


def _loss_call(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(self: keras.Loss, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        value = original(self, y_true, y_pred, sample_weight)
        tell("loss_called", self, value, y_pred, sample_weight)
        return value

    return call


def _adding_loss(original: Callable[[Layer, Any], None]) -> Callable[[Layer, Any], None]:
    def add_loss(self: Layer, loss: Any) -> None:
        original(self, loss)
        tell("loss_added", self, loss)

    return add_loss


def _losses(original: Callable[[Layer], list[Tensor]]) -> Callable[[Layer], list[Tensor]]:
    def losses(self: Layer) -> list[Tensor]:
        found = original(self)
        # First the added losses, then the regularization.
        regularized = [variable for variable in self.trainable_weights if variable.regularizer is not None]
        sources = [*found[: len(found) - len(regularized)], *regularized]
        pairs = zip(sources, found, strict=True)
        return found if is_building() else [_replaced("penalty_read", *pair) for pair in pairs]

    return losses


def _layer_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Layer, *args: Any, **kwargs: Any) -> Any:
        with _calls.here(_calls.get() + 1), passed_over(args) as inputs:
            outputs = original(self, *inputs, **kwargs)
        if not _calls.get():
            tell("layer_called", self, outputs)
        return outputs

    return call


def _mask_computation(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_mask(self: Layer, *args: Any, **kwargs: Any) -> Any:
        mask = original(self, *args, **kwargs)
        return mask if mask is None or _calls.get() else _replaced("mask_computed", self, mask)

    return compute_mask


def _optimizer_apply(original: Callable[..., None]) -> Callable[..., None]:
    def apply(self: keras.Optimizer, grads: Any, trainable_variables: Any = None) -> None:
        tell("applied", self, trained_by(self) if trainable_variables is None else trainable_variables)
        original(self, grads, trainable_variables)

    return apply


_PATCH = Patch(
    (python_utils, "pythonify_logs", lambda _: lambda logs: logs),  # Numbers would not show whose results they are.
    (keras.Variable, "__init__", _creation),
    (keras.Variable, "value", _reading),
    (keras.Variable, "assign", functools.partial(_telling_before, "assigned")),
    # Subclasses override update_state and result, but all share the look-up of attributes.
    (keras.Metric, "__getattribute__", _metric_attribute),
    (_unpack, "__code__", _unpacking),  # Users import it by name.
    (keras.Loss, "__call__", _loss_call),
    (keras.Layer, "add_loss", _adding_loss),
    (keras.Layer, "losses", _losses),
    (keras.Layer, "__call__", _layer_call),
    # The layers from which masks come; the others pass them on.
    (keras.layers.Embedding, "compute_mask", _mask_computation),
    (keras.layers.Masking, "compute_mask", _mask_computation),
    (keras.optimizers.Optimizer, "apply", _optimizer_apply),
)
