"""What happens inside Keras while a user's function runs: variables made, metrics used, losses added.

NullModel registers anything with Handloom, so it looks on. Each of these replaces a public method of a Keras class
for as long as a function is traced (or, op by op, runs once), and for the thread that asked only.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from handloom._keras import (
    Layer,
    Tensor,
    Variable,
    get_keras_mask,
    keras,
    layers_of,
    set_keras_mask,
    trained_by,
)
from handloom._trace.loss_weight import SUM, Divisor, Weight


@contextlib.contextmanager
def _replaced(owner: type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces an attribute of a class by `make(original)`, and puts back just what was there."""
    original, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, make(vars(owner).get(name, original)))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _is_known(value: Any) -> bool:
    """Whether the first value of a variable is made of numbers and NumPy arrays."""
    kinds = (np.ndarray, np.generic, bool, int, float, complex)
    return all(isinstance(leaf, kinds) for leaf in keras.tree.flatten(value))


def _as_initializer(value: Any, dtype: Any) -> tuple[tuple[int, ...], Any, Callable[..., Tensor]]:
    """Shape, dtype and initializer for a known value: Keras makes variables in a trace from initializers only."""
    convert = keras.ops.convert_to_tensor
    return np.shape(value), dtype or convert(value).dtype, lambda _, dtype: convert(value, dtype=dtype)


class OwnVariable(keras.Variable):
    """A variable that Handloom keeps for itself. It may be made at any time, by whoever."""


@contextlib.contextmanager
def new_variables() -> Iterator[list[Variable]]:
    """Lists the Keras variables created inside, Handloom's own apart."""
    created: list[Variable] = []
    thread = threading.get_ident()

    def make(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(
            self: Variable, initializer: Any, shape: Any = None, dtype: Any = None, *args: Any, **options: Any
        ) -> None:
            if threading.get_ident() == thread:
                if not isinstance(self, OwnVariable):
                    created.append(self)
                if _is_known(initializer):
                    shape, dtype, initializer = _as_initializer(initializer, dtype)
            original(self, initializer, shape, dtype, *args, **options)

        return init

    with _replaced(keras.Variable, "__init__", make):
        yield created


@contextlib.contextmanager
def _assignments_noted(on_assign: Callable[[Variable], None]) -> Iterator[None]:
    """Tells of each variable that is about to be assigned inside."""
    thread = threading.get_ident()

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def assign(self: Variable, value: Any) -> Tensor:
            if threading.get_ident() == thread:
                on_assign(self)
            return original(self, value)

        return assign

    with _replaced(keras.Variable, "assign", make):
        yield


@contextlib.contextmanager
def variables_touched() -> Iterator[tuple[dict[int, Variable], dict[int, Variable]]]:
    """Collects the variables that are read or assigned inside, and those that are assigned, Handloom's own apart.

    Both by id.
    """
    touched: dict[int, Variable] = {}
    assigned: dict[int, Variable] = {}
    thread = threading.get_ident()

    def note(variable: Variable) -> None:
        if not isinstance(variable, OwnVariable):
            touched[id(variable)] = variable

    def note_assigned(variable: Variable) -> None:
        if not isinstance(variable, OwnVariable):
            touched[id(variable)] = assigned[id(variable)] = variable

    def noting_read(original: property) -> property:
        def value(self: Variable) -> Tensor:
            if threading.get_ident() == thread:
                note(self)
            return original.fget(self)  # type: ignore[misc]

        return property(value, doc=original.__doc__)

    with _replaced(keras.Variable, "value", noting_read), _assignments_noted(note_assigned):
        yield touched, assigned


class Metrics:
    """The metrics that were updated, and the tensors that came out of a `result()`; made by `metrics_used`."""

    def __init__(self, on_update: Callable[[keras.Metric], None] | None = None) -> None:
        self._on_update = on_update
        self._updated: dict[int, keras.Metric] = {}
        # By id, and kept: an id is a tensor's own only as long as it lives.
        self._results: dict[int, tuple[Any, keras.Metric]] = {}

    @property
    def updated(self) -> tuple[keras.Metric, ...]:
        """The metrics whose `update_state` was called, in the order of the first call."""
        return tuple(self._updated.values())

    def note_update(self, metric: keras.Metric) -> None:
        if self._on_update is not None and id(metric) not in self._updated:
            self._on_update(metric)
        self._updated[id(metric)] = metric

    def note_result(self, result: Any, metric: keras.Metric) -> None:
        for leaf in keras.tree.flatten(result):
            self._results.setdefault(id(leaf), (leaf, metric))  # Of a metric made of others, it is that of the other.

    def source(self, tensor: Any) -> keras.Metric | None:
        """The metric whose result a tensor is, if it is one."""
        return self._results[id(tensor)][1] if id(tensor) in self._results else None


@contextlib.contextmanager
def metrics_used(on_update: Callable[[keras.Metric], None] | None = None) -> Iterator[Metrics]:
    """Notes which metrics are updated inside, and what they give as results.

    Args:
        on_update: Called with each metric right before its first update.
    """
    metrics = Metrics(on_update)
    thread = threading.get_ident()

    def make(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def look_up(self: keras.Metric, name: str) -> Any:
            attribute = original(self, name)
            if name not in ("result", "update_state") or threading.get_ident() != thread:
                return attribute

            def noted(*args: Any, **kwargs: Any) -> Any:
                if name == "update_state":
                    metrics.note_update(self)
                value = attribute(*args, **kwargs)
                if name == "result":
                    metrics.note_result(value, self)
                return value

            return noted

        return look_up

    # Subclasses define these methods; the look-up of attributes they all share.
    with _replaced(keras.Metric, "__getattribute__", make):
        yield metrics


@contextlib.contextmanager
def _losses_noted(on_added: Callable[[Layer, Any], None], on_read: Callable[[Layer], None]) -> Iterator[None]:
    """Tells of each loss that a layer has added inside, and of each layer whose losses are about to be read."""
    thread = threading.get_ident()

    def noting_added(original: Callable[[Layer, Any], None]) -> Callable[[Layer, Any], None]:
        @functools.wraps(original)
        def add_loss(self: Layer, loss: Any) -> None:
            original(self, loss)
            if threading.get_ident() == thread:
                on_added(self, loss)

        return add_loss

    def noting_read(original: property) -> property:
        def read(self: Layer) -> list[Tensor]:
            if threading.get_ident() == thread:
                on_read(self)
            found: list[Tensor] = original.fget(self)  # type: ignore[misc]
            return found

        return property(read, doc=original.__doc__)

    with _replaced(keras.Layer, "add_loss", noting_added), _replaced(keras.Layer, "losses", noting_read):
        yield


class StepLosses:
    """Which added losses and regularizers are in no loss of a step that trains; made by `losses_in_step`."""

    def __init__(self) -> None:
        self._added: dict[int, Layer] = {}
        self._updated: dict[int, Variable] = {}
        self._counted: set[int] = set()

    def note_added(self, layer: Layer) -> None:
        self._added[id(layer)] = layer

    def note_counted(self, *items: Layer | Variable) -> None:
        self._counted.update(map(id, items))

    def note_updated(self, variables: Iterable[Variable]) -> None:
        self._updated.update((id(variable), variable) for variable in variables)

    def unused(self) -> list[str]:
        """What is in no loss, in words; nothing, unless an optimizer was applied."""
        if not self._updated:
            return []
        layers = [layer for key, layer in self._added.items() if key not in self._counted]
        variables = [variable for key, variable in self._updated.items() if key not in self._counted]
        regularized = [variable.path for variable in variables if variable.regularizer is not None]
        return [f"the losses added by {layer.name!r}" for layer in layers] + [
            f"the regularizer of {path!r}" for path in regularized
        ]


_step_losses: contextvars.ContextVar[StepLosses | None] = contextvars.ContextVar("step_losses", default=None)


@contextlib.contextmanager
def losses_in_step() -> Iterator[StepLosses]:
    """Notes which losses layers add inside, which of them are read or minimized, and what optimizers update."""
    losses = StepLosses()

    def note_added(layer: Layer, loss: Any) -> None:
        del loss
        if _step_losses.get() is losses:
            losses.note_added(layer)

    def note_read(layer: Layer) -> None:
        if _step_losses.get() is losses:
            losses.note_counted(*(item for inner in layers_of(layer) for item in [inner, *inner.trainable_variables]))

    def noting_updated(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def apply(self: keras.Optimizer, grads: Any, trainable_variables: Any = None) -> None:
            if _step_losses.get() is losses:
                losses.note_updated(trained_by(self) if trainable_variables is None else trainable_variables)
            original(self, grads, trainable_variables)

        return apply

    token = _step_losses.set(losses)
    try:
        with _losses_noted(note_added, note_read), _replaced(keras.optimizers.Optimizer, "apply", noting_updated):
            yield losses
    finally:
        _step_losses.reset(token)


@contextlib.contextmanager
def masks_marked(mark: Callable[[Tensor, str], Tensor]) -> Iterator[None]:
    """Marks the masks of what layers return that a step calls itself.

    Args:
        mark: Takes a mask and its name, returns the mask to put in its place.
    """
    thread, depth = threading.get_ident(), 0

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self: Layer, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if threading.get_ident() != thread:
                return original(self, *args, **kwargs)
            depth += 1
            try:
                outputs = original(self, *args, **kwargs)
            finally:
                depth -= 1
            for output in keras.tree.flatten(outputs) if depth == 0 else ():
                mask = get_keras_mask(output)
                if mask is not None:
                    set_keras_mask(output, mark(mask, f"the mask of what {self.name!r} returns"))
            return outputs

        return call

    with _replaced(keras.Layer, "__call__", make):
        yield


class Losses:
    """What a loss function left out of the losses that belong to it; made by `losses_of`."""

    def __init__(self, variables: list[Variable], layers: list[Layer]) -> None:
        self._variables = variables
        self._owned = {id(item) for item in [*variables, *(inner for layer in layers for inner in layers_of(layer))]}
        self._added: list[tuple[Layer, Tensor]] = []
        self._regularized: set[int] = set()

    def left_out(self) -> list[Tensor]:
        """The regularization and added losses that the function did not read itself; they now count."""
        step = _step_losses.get()
        if step is not None:
            step.note_counted(*self._variables, *(layer for layer, _ in self._added))
        penalties = [
            variable.regularizer(variable)
            for variable in self._variables
            if variable.regularizer is not None and id(variable) not in self._regularized
        ]
        return penalties + [loss for _, loss in self._added]

    def note_added(self, layer: Layer, loss: Any) -> None:
        if any(id(variable) in self._owned for variable in layer.variables) or id(layer) in self._owned:
            self._added.extend((layer, value) for value in keras.tree.flatten(loss))

    def note_read(self, layer: Layer) -> None:
        read = list(layers_of(layer))
        self._added = [(inner, loss) for inner, loss in self._added if inner not in read]
        self._regularized.update(id(variable) for inner in read for variable in inner.trainable_variables)


@contextlib.contextmanager
def losses_of(variables: list[Variable], layers: list[Layer]) -> Iterator[Losses]:
    """Watches which losses a function adds and reads, of the given variables and layers.

    Reading `layer.losses`, as `Model.compute_loss` and many a hand-written loss do, means that the function takes
    care of that layer's losses itself.
    """
    losses = Losses(variables, layers)
    with _losses_noted(losses.note_added, losses.note_read):
        yield losses


class Divisors:
    """What losses were divided by; made by `divisors`.

    Attributes:
        losses: The losses that were minimized inside, or computed by a model's `compute_loss`.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[Tensor, Divisor]] = {}  # By id, and kept: an id is a tensor's own while it lives.
        self.losses: list[Tensor] = []

    def note(self, loss: Tensor, divisor: Divisor) -> None:
        self._noted[id(loss)] = loss, divisor

    def of(self, loss: Any) -> Divisor | None:
        """What this loss was divided by, if that is known."""
        return self._noted[id(loss)][1] if id(loss) in self._noted else None

    def distinct(self) -> list[Divisor]:
        """The different divisors."""
        found = [divisor for _, divisor in self._noted.values()]
        return list({(divisor.by, _identity(divisor.value)): divisor for divisor in found}.values())


def _identity(value: Weight) -> Any:
    return value if isinstance(value, (int, str)) else id(value)


_divisors: contextvars.ContextVar[Divisors | None] = contextvars.ContextVar("divisors", default=None)


@contextlib.contextmanager
def divisors() -> Iterator[Divisors]:
    """Notes what the Keras losses computed inside were divided by: examples, or the sum of a mask or of weights."""
    noted = Divisors()
    masks: dict[int, tuple[Any, Tensor]] = {}
    thread = threading.get_ident()

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def call(self: keras.Loss, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
            loss = original(self, y_true, y_pred, sample_weight)
            if threading.get_ident() == thread:
                divisor = _divisor(self.reduction, y_pred, sample_weight, masks)
                if divisor is not None:
                    noted.note(loss, divisor)
            return loss

        return call

    token = _divisors.set(noted)
    try:
        with _replaced(keras.Loss, "__call__", make):
            yield noted
    finally:
        _divisors.reset(token)


def note_loss(loss: Tensor, divided_by: list[Divisor]) -> None:
    """Tells whoever watches of a step's loss, and the different numbers that its parts were divided by."""
    noted = _divisors.get()
    if noted is None:
        return
    noted.losses.append(loss)
    if len(divided_by) == 1:
        noted.note(loss, divided_by[0])


def _divisor(
    reduction: str | None, y_pred: Any, sample_weight: Any, masks: dict[int, tuple[Any, Tensor]]
) -> Divisor | None:
    if reduction == "sum":
        return Divisor("nothing", SUM)
    mask = next((mask for mask in map(get_keras_mask, keras.tree.flatten(y_pred)) if mask is not None), None)
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        weight = keras.ops.convert_to_tensor(sample_weight, keras.config.floatx())
        weight = weight if mask is None else weight * keras.ops.cast(mask, weight.dtype)
        return Divisor("weights", keras.ops.sum(weight))
    if mask is None:
        shape = tuple(getattr(keras.tree.flatten(y_pred)[0], "shape", ()))
        return Divisor("examples", shape[0]) if shape else None
    if id(mask) not in masks:  # One number for all the losses under one mask.
        masks[id(mask)] = mask, keras.ops.sum(keras.ops.cast(mask, keras.config.floatx()))
    return Divisor("mask", masks[id(mask)][1])


@contextlib.contextmanager
def assignments_undone() -> Iterator[None]:
    """Variables that are assigned inside have their values back after."""
    before: dict[int, tuple[Variable, Tensor]] = {}

    def keep(variable: Variable) -> None:
        if id(variable) not in before:
            before[id(variable)] = variable, keras.ops.copy(variable.value)

    with _assignments_noted(keep):
        yield
    for variable, value in before.values():
        variable.assign(value)
