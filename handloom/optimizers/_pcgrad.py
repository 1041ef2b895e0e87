"""Gradients of several losses, freed of their conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handloom._keras import Tensor, Variable, keras
from handloom.optimizers._wrapper import Differentiate, Wrapper

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class PCGrad(Wrapper):
    """Projects the gradients of several losses so that none points against another, and sums them.

    Where the gradients of two losses conflict (their product is negative), each loses its part along the other; one
    loss is compared with the others in random order. (Yu et al., Gradient Surgery for Multi-Task Learning, 2020.) The
    loss function returns all losses as one vector, `ops.stack([a, b])`; penalties that `minimize` adds are not
    projected. Works through `hl.minimize` and `Model.minimize` only, since an optimizer by itself sees no losses.

    Args:
        inner_optimizer: The optimizer that updates.
        seed: Seed of the order.
        name: Name of the optimizer.

    Example:
        `hl.minimize(lambda: ops.stack([loss_a(), loss_b()]), model, PCGrad("adam"))` returns their sum.
    """

    def __init__(self, inner_optimizer: Any, seed: int = 0, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.seed = seed
        self.keep(_generator=keras.random.SeedGenerator(seed))

    def take_gradients(
        self, differentiate: Differentiate, variables: list[Variable]
    ) -> tuple[Any, list[Tensor | None]]:
        result, gradients, of_penalties = differentiate.each()
        factors = self._factors(_products(gradients))
        places = range(len(variables))
        return result, [_sum([row[place] for row in gradients], factors, of_penalties[place]) for place in places]

    def _factors(self, products: Tensor) -> Tensor:
        """How much of each gradient is in the sum of all projected ones, from the products of each two."""
        count = products.shape[0]
        orders = ops.argsort(keras.random.uniform((count, count), seed=self._generator), axis=1)
        return sum((_projected(task, orders[task], products) for task in range(count)), start=ops.zeros((count,)))

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        self.apply_inner(gradients, variables)

    @property
    def variables(self) -> list[Variable]:
        return [*super().variables, self._generator.state]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"seed": self.seed}


def _products(gradients: Sequence[list[Tensor | None]]) -> Tensor:
    """The product of each two gradients, taken over all variables: shape `(losses, losses)`, in float32."""
    return ops.stack([ops.stack([_product(one, other) for other in gradients]) for one in gradients])


def _product(one: list[Tensor | None], other: list[Tensor | None]) -> Tensor:
    parts = [
        ops.sum(ops.cast(a, "float32") * ops.cast(b, "float32"))
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    return sum(parts, start=ops.zeros(()))


def _projected(task: int, order: Tensor, products: Tensor) -> Tensor:
    """One gradient, projected, as factors of all the gradients: `(losses,)`."""
    count = products.shape[0]
    itself = factors = ops.one_hot(task, count)
    for place in range(count):
        other = ops.one_hot(order[place], count)
        row = ops.matmul(other, products)
        product, square = ops.sum(row * factors), ops.sum(row * other)
        conflict = ops.logical_and(ops.equal(ops.sum(itself * other), 0), product < 0)  # Then the square is not zero.
        factors = factors - ops.where(conflict, product / ops.where(conflict, square, 1.0), 0.0) * other
    return factors


def _sum(gradients: list[Tensor | None], factors: Tensor, of_penalty: Tensor | None) -> Tensor | None:
    parts = [
        gradient * ops.cast(factors[place], gradient.dtype)
        for place, gradient in enumerate(gradients)
        if gradient is not None
    ]
    parts += [] if of_penalty is None else [of_penalty]
    return sum(parts[1:], start=parts[0]) if parts else None
