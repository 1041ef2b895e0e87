"""Optimizers that take the gradients of the loss themselves: sharpness-aware minimization and gradient surgery."""

import functools
from collections.abc import Sequence
from typing import Any

from handloom._keras import Gradients, Tensor, Variable, keras
from handloom._trace.observe import assignments_undone
from handloom._util.arguments import positive_number
from handloom.backends import backend
from handloom.optimizers._loss_function import LossFunction
from handloom.optimizers._transforms import global_norm
from handloom.optimizers._wrapper import Wrapper

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class SAM(Wrapper):
    """Takes the gradient where the loss is highest near the weights, which leads to flatter minima.

    Each step takes two gradients: the first leads `radius` up along the normalized gradient, the second is taken there
    and applied at the weights themselves. (Foret et al., Sharpness-Aware Minimization, 2021.) Assignments of the second
    pass (batch-norm statistics, metrics, seeds) are undone, so that they happen once. Works with `hl.minimize` and
    `Model.minimize` only, since `apply` receives no loss.

    Args:
        inner_optimizer: The optimizer that updates.
        radius: The distance, in units of the weights.
        name: The name of the optimizer.

    Raises:
        ArgumentError: `radius` is not a positive number.
    """

    options = ("radius",)

    def __init__(self, inner_optimizer: Any, radius: float = 0.05, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.radius = positive_number("SAM", radius=radius)

    def take_gradients(self, loss: LossFunction) -> tuple[Any, Gradients]:
        """Computes the loss and the gradients to update with; see `LossFunction.gradients`."""
        result, found = loss.gradients()
        gradients = list(map(backend.dense, found))
        factor = self.radius / (global_norm(gradients) + keras.config.epsilon())
        with assignments_undone():
            for variable, gradient in zip(loss.variables, gradients, strict=True):
                if gradient is not None:
                    variable.assign(variable.value + gradient * ops.cast(factor, gradient.dtype))
            return result, loss.gradients()[1]


@keras.saving.register_keras_serializable("handloom")
class PCGrad(Wrapper):
    """Projects the gradients of several losses so that none points against another, and sums them.

    Two gradients conflict if their product is negative; each then loses its part along the other. Each gradient is
    compared with the others in random order. (Yu et al., Gradient Surgery for Multi-Task Learning, 2020.) The loss
    function returns all losses as one vector, `ops.stack([a, b])`; penalties that `minimize` adds are not projected.
    Works with `hl.minimize` and `Model.minimize` only, since `apply` receives no losses.

    Args:
        inner_optimizer: The optimizer that updates.
        seed: The seed of the order.
        name: The name of the optimizer.

    Example:
        `hl.minimize(lambda: ops.stack([loss_a(), loss_b()]), model, PCGrad("adam"))` returns their sum.
    """

    options = ("seed",)

    def __init__(self, inner_optimizer: Any, seed: int = 0, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.seed = seed
        self._generator = keras.random.SeedGenerator(seed)

    def take_gradients(self, loss: LossFunction) -> tuple[Any, Gradients]:
        """Computes the losses and their projected gradients; see `LossFunction.gradients_of_each`."""
        result, [*gradients, of_penalties] = loss.gradients_of_each()
        factors = [*ops.unstack(self._factors(_products(gradients))), 1.0]
        return result, [_sum(column, factors) for column in zip(*gradients, of_penalties, strict=True)]

    def _factors(self, products: Tensor) -> Tensor:
        """The factor of each gradient in the sum of all projected ones, from the products of each pair."""
        count = products.shape[0]
        orders = ops.argsort(keras.random.uniform((count, count), seed=self._generator), axis=1)
        return sum((_projected(task, orders[task], products) for task in range(count)), start=ops.zeros((count,)))

    @property
    def variables(self) -> list[Variable]:
        return [*super().variables, self._generator.state]


def _products(gradients: Sequence[Gradients]) -> Tensor:
    """The product of each pair of gradients, taken over all variables: shape `(losses, losses)`, in float32."""
    return ops.stack([ops.stack([_product(one, other) for other in gradients]) for one in gradients])


def _product(one: Gradients, other: Gradients) -> Tensor:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return sum((ops.sum(ops.cast(a, "float32") * ops.cast(b, "float32")) for a, b in pairs), start=ops.zeros(()))


def _projected(task: int, order: Tensor, products: Tensor) -> Tensor:
    """One projected gradient, as factors of all the gradients: `(losses,)`."""
    count = products.shape[0]
    itself = factors = ops.one_hot(task, count)
    for place in range(count):
        other = ops.one_hot(order[place], count)
        row = ops.matmul(other, products)
        product, square = ops.sum(row * factors), ops.sum(row * other)
        conflict = ops.logical_and(ops.equal(ops.sum(itself * other), 0), product < 0)  # Then the square is not zero.
        factors = factors - ops.where(conflict, product / ops.where(conflict, square, 1.0), 0.0) * other
    return factors


def _sum(gradients: Sequence[Tensor | None], factors: Sequence[Any]) -> Tensor | None:
    pairs = [(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True) if gradient is not None]
    terms = [gradient * ops.cast(factor, gradient.dtype) for gradient, factor in pairs]
    return functools.reduce(ops.add, terms) if terms else None
