"""The losses of a step: their denominators, and the added losses and regularizers that none of them includes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from handloom._keras import Layer, Tensor, Variable, get_keras_mask, keras, layers_of
from handloom._trace.loss_weight import SUM, Weight
from handloom._trace.observe import Observer, innermost

ops = keras.ops


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


class UncountedLosses(Observer):
    """Observes which added losses and regularizers a step trains without."""

    def __init__(self) -> None:
        self._added: dict[int, Layer] = {}
        self._updated: dict[int, Variable] = {}
        self._counted: set[int] = set()

    def loss_added(self, layer: Layer, loss: Any) -> None:
        self._added[id(layer)] = layer

    def losses_read(self, layer: Layer) -> None:
        self.count(*(item for inner in layers_of(layer) for item in [inner, *inner.trainable_variables]))

    def applied(self, optimizer: keras.Optimizer, variables: Sequence[Variable]) -> None:
        self._updated.update((id(variable), variable) for variable in variables)

    def count(self, *items: Layer | Variable) -> None:
        """Records that a loss includes the added losses and regularizers of these."""
        self._counted.update(map(id, items))

    @property
    def applies(self) -> bool:
        """Whether the step has applied an optimizer."""
        return bool(self._updated)

    def descriptions(self) -> list[str]:
        """Descriptions of what no loss includes; empty if the step applied no optimizer."""
        if not self._updated:
            return []
        layers = [layer for key, layer in self._added.items() if key not in self._counted]
        variables = [variable for key, variable in self._updated.items() if key not in self._counted]
        regularized = [variable.path for variable in variables if variable.regularizer is not None]
        return [f"the losses added by {layer.name!r}" for layer in layers] + [
            f"the regularizer of {path!r}" for path in regularized
        ]


class OwnLosses(Observer):
    """Observes which added losses and regularizers of trained variables a loss function does not include itself.

    A function that reads `layer.losses`, as `Model.compute_loss` does, includes the losses of that layer itself.

    Args:
        variables: The trained variables.
        layers: The trained layers.
    """

    def __init__(self, variables: list[Variable], layers: list[Layer]) -> None:
        self._variables = variables
        self._owned = {id(item) for item in [*variables, *(inner for layer in layers for inner in layers_of(layer))]}
        self._added: list[tuple[Layer, Tensor]] = []
        self._regularized: set[int] = set()

    def loss_added(self, layer: Layer, loss: Any) -> None:
        if any(id(variable) in self._owned for variable in layer.variables) or id(layer) in self._owned:
            self._added.extend((layer, value) for value in keras.tree.flatten(loss))

    def losses_read(self, layer: Layer) -> None:
        read = list(layers_of(layer))
        self._added = [(inner, loss) for inner, loss in self._added if inner not in read]
        self._regularized.update(id(variable) for inner in read for variable in inner.trainable_variables)

    def left_out(self) -> list[Tensor]:
        """The regularization and added losses that the function did not include; the caller adds them."""
        step = innermost(UncountedLosses)
        if step is not None:
            step.count(*self._variables, *(layer for layer, _ in self._added))
        penalties = [
            variable.regularizer(variable)
            for variable in self._variables
            if variable.regularizer is not None and id(variable) not in self._regularized
        ]
        return penalties + [loss for _, loss in self._added]
