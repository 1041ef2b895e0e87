"""The losses of a step: their denominators, and the added losses and regularizers that none of them includes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from handloom._keras import Layer, Tensor, Variable, get_keras_mask, keras, layers_of
from handloom._trace.loss_weight import SUM, Weight
from handloom._trace.observe import Observer, innermost, observing
from handloom._util.first_few import first_few
from handloom.backends import backend

ops = keras.ops

T = TypeVar("T")


class Denominator(NamedTuple):
    """The number that a loss was divided by.

    Attributes:
        by: `"examples"`, `"mask"`, `"weights"`, or `"nothing"` for a sum.
        value: The number of examples, the sum of the mask or of the weights; `SUM` for a sum.
        summed: The mask or weights themselves: denominators of the same ones are the same.
    """

    by: str
    value: Weight
    summed: tuple[Any, ...] = ()


class Denominators(Observer):
    """Observes the denominators of the Keras losses of a step.

    Attributes:
        losses: The losses that the step minimized, or computed by a model's `compute_loss`.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        # By id, with the tensor: an id belongs to it only as long as it lives.
        self._known: dict[int, tuple[Tensor, Denominator]] = {}

    def loss_called(self, loss: keras.Loss, value: Tensor, y_pred: Any, sample_weight: Any) -> None:
        denominator = self._denominator(loss.reduction, y_pred, sample_weight)
        if denominator is not None:
            self._known[id(value)] = value, denominator

    def add(self, loss: Tensor, divided_by: Sequence[Denominator]) -> None:
        """Records a loss of the step with the denominators of its parts."""
        self.losses.append(loss)
        if len(divided_by) == 1:
            self._known[id(loss)] = loss, divided_by[0]

    def is_loss(self, value: Any) -> bool:
        """Whether a value is a loss of the step."""
        return any(value is loss for loss in self.losses)

    def of(self, loss: Any) -> Denominator | None:
        """The denominator of a loss, if it is known."""
        return self._known[id(loss)][1] if id(loss) in self._known else None

    def distinct(self) -> list[Denominator]:
        """The different denominators."""
        found = [denominator for _, denominator in self._known.values()]
        return list({_identity(denominator): denominator for denominator in found}.values())

    def _denominator(self, reduction: str | None, y_pred: Any, sample_weight: Any) -> Denominator | None:
        if reduction == "sum":
            return Denominator("nothing", SUM)
        mask = next((mask for mask in map(get_keras_mask, keras.tree.flatten(y_pred)) if mask is not None), None)
        if reduction == "mean_with_sample_weight" and sample_weight is not None:
            weight = ops.convert_to_tensor(sample_weight, keras.config.floatx())
            weight = weight if mask is None else weight * ops.cast(mask, weight.dtype)
            return Denominator("weights", ops.sum(weight), (sample_weight, mask))
        if mask is None:
            shape = tuple(getattr(keras.tree.flatten(y_pred)[0], "shape", ()))
            return Denominator("examples", shape[0]) if shape else None
        return Denominator("mask", ops.sum(ops.cast(mask, keras.config.floatx())), (mask,))


def _identity(denominator: Denominator) -> Any:
    return denominator.by, tuple(map(id, denominator.summed)) or denominator.value


def note_loss(loss: Tensor, divided_by: Sequence[Denominator]) -> None:
    """Records a loss of the step that runs here; see `Denominators.add`."""
    denominators = innermost(Denominators)
    if denominators is not None:
        denominators.add(loss, divided_by)


def noted(compute: Callable[[], Tensor]) -> Tensor:
    """Computes a loss of the step, and records it with the denominators of the losses of Keras in it."""
    denominators = Denominators()
    with observing(denominators):
        loss = compute()
    note_loss(loss, denominators.distinct())
    return loss


class UncountedLosses(Observer):
    """Observes which added losses and regularizers a step trains without.

    In a step that leaves differentiation to the framework, the losses that it reads count as included.
    """

    def __init__(self) -> None:
        # By the id of a layer, loss or variable, with the loss: an id belongs to it only as long as it lives.
        self._added: dict[int, Layer] = {}
        self._layers: dict[int, tuple[Tensor, Layer]] = {}
        self._updated: dict[int, Variable] = {}
        self._counted: set[int] = set()
        self._read: set[int] = set()
        self._differentiates = False

    def loss_added(self, layer: Layer, loss: Any) -> None:
        self._added[id(layer)] = layer
        self._layers.update((id(value), (value, layer)) for value in keras.tree.flatten(loss))

    def penalty_read(self, source: Any, penalty: Tensor) -> Tensor:
        _, item = self._layers.get(id(source), (None, source))
        if backend.depth and backend.is_array(penalty):
            return backend.term_twice(penalty, functools.partial(self.count, item))[0]
        self._read.add(id(item))
        return penalty

    def differentiated(self, value: Tensor) -> None:
        self._differentiates = True

    def applied(self, optimizer: keras.Optimizer, variables: Sequence[Variable]) -> None:
        self._updated.update((id(variable), variable) for variable in variables)

    def count(self, *items: Layer | Variable) -> None:
        """Records that a loss includes the added losses and regularizers of these."""
        self._counted.update(map(id, items))

    @property
    def applies(self) -> bool:
        """Whether the step has applied an optimizer."""
        return bool(self._updated)

    def descriptions(self, *, of_trained: bool = False) -> list[str]:
        """Descriptions of what no loss includes; empty if the step applied no optimizer.

        Args:
            of_trained: Only of layers that the step trains: another step may train the others.
        """
        if not self._updated:
            return []
        counted = self._counted if self._differentiates else self._counted | self._read
        layers = [layer for key, layer in self._added.items() if key not in counted]
        if of_trained:
            layers = [layer for layer in layers if any(id(variable) in self._updated for variable in layer.variables)]
        variables = [variable for key, variable in self._updated.items() if key not in counted]
        regularized = [variable.path for variable in variables if variable.regularizer is not None]
        parts = {"the losses added by": [layer.name for layer in layers], "the regularizer of": regularized}
        return [f"{what} {first_few([*map(repr, names)], 3)}" for what, names in parts.items() if names]


class InnerLosses(Observer):
    """Observes the losses added in a differentiated function, which a function around it may have to count.

    Those that the function reads itself are its own.
    """

    def __init__(self) -> None:
        self._depth = backend.depth
        self._added: dict[int, tuple[Layer, Tensor]] = {}

    def loss_added(self, layer: Layer, loss: Any) -> None:
        if backend.depth == self._depth:
            self._added.update((id(value), (layer, value)) for value in keras.tree.flatten(loss))

    def penalty_read(self, source: Any, penalty: Tensor) -> Tensor:
        self._added.pop(id(source), None)
        return penalty

    @property
    def added(self) -> list[tuple[Layer, Tensor]]:
        """The losses, each with its layer."""
        return list(self._added.values())


class OwnLosses(Observer):
    """Observes which added losses and regularizers of trained variables a loss function does not include itself.

    A function may read `layer.losses` (as `Model.compute_loss` does) to include them, or only to report them. So each
    loss that it reads is a term of its own, and known to be included once the function is differentiated.

    Args:
        variables: The trained variables.
        layers: The trained layers.
    """

    def __init__(self, variables: list[Variable], layers: list[Layer]) -> None:
        self._variables = variables
        self._regularized = [variable for variable in variables if variable.regularizer is not None]
        self._owned = {id(item) for item in [*variables, *(inner for layer in layers for inner in layers_of(layer))]}
        self._depth, self._place = backend.depth, backend.place
        # By the id of an added loss or a regularized variable.
        self._added: dict[int, tuple[Tensor, Layer]] = {}
        self._terms: dict[int, tuple[Tensor, Tensor]] = {}
        self._included: set[int] = set()

    def loss_added(self, layer: Layer, loss: Any) -> None:
        is_owned = any(id(variable) in self._owned for variable in layer.variables) or id(layer) in self._owned
        if is_owned and backend.depth == self._depth:
            self._added.update((id(value), (value, layer)) for value in keras.tree.flatten(loss))

    def differentiates(self) -> None:
        # The inner function may read the regularization, and the outer one include it or not.
        for variable in self._regularized if backend.place == self._place else ():
            self.penalty_read(variable, variable.regularizer(variable))

    def penalty_read(self, source: Any, penalty: Tensor) -> Tensor:
        key = id(source)
        if key not in self._owned and key not in self._added:
            return penalty
        if key in self._terms:
            return penalty + 0 * self._terms[key][0]  # The same term: a loss with this one has the first.
        if backend.place != self._place or not backend.is_array(penalty):
            self._included.add(key)  # What is read in a branch or loop can be used there only.
            return penalty
        self._terms[key] = backend.term_twice(penalty, functools.partial(self._included.add, key))
        return self._terms[key][0]

    def unread_terms(self) -> list[Tensor]:
        """The regularization and added losses that the function did not read; the caller adds them to its result."""
        step = innermost(UncountedLosses)
        if step is not None:
            step.count(*self._variables, *(layer for _, layer in self._added.values()))
        known = self._included.union(self._terms)
        added = [loss for key, (loss, _) in self._added.items() if key not in known]
        return [weight.regularizer(weight) for weight in self._regularized if id(weight) not in known] + added

    def read_terms(self) -> list[tuple[int, Tensor]]:
        """Those that it read, each with a key, to add too: they have no gradient if the function includes them."""
        return [(key, second) for key, (_, second) in self._terms.items()]

    def left_out(self, read: list[tuple[int, T]]) -> list[T]:
        """What belongs to those that the function read and does not include, once it is differentiated."""
        return [found for key, found in read if key not in self._included]
