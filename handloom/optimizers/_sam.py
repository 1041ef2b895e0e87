"""Gradients taken where the loss is worst nearby."""

from __future__ import annotations

from typing import Any

from handloom._keras import Tensor, Variable, keras
from handloom._trace.observe import assignments_undone
from handloom.optimizers._transforms import check_positive, global_norm
from handloom.optimizers._wrapper import Differentiate, Wrapper

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class SAM(Wrapper):
    """Takes the gradient not at the weights but at the steepest point near them, which leads to flatter minima.

    Two gradients a step: the first leads `radius` up along the normalized gradient, the second is taken there and
    applied at the weights themselves. (Foret et al., Sharpness-Aware Minimization, 2021.) What the second pass does to
    other variables (batch-norm statistics, metrics, seeds) is undone, so that it happens once. Works through
    `hl.minimize` and `Model.minimize` only, since an optimizer by itself sees no loss.

    Args:
        inner_optimizer: The optimizer that updates.
        radius: The distance, in the weights' own unit.
        name: Name of the optimizer.
    """

    def __init__(self, inner_optimizer: Any, radius: float = 0.05, name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        check_positive("SAM", radius=radius)
        self.radius = radius

    def take_gradients(
        self, differentiate: Differentiate, variables: list[Variable]
    ) -> tuple[Any, list[Tensor | None]]:
        result, gradients = differentiate()
        weights = [ops.copy(variable.value) for variable in variables]
        factor = self.radius / (global_norm(gradients) + keras.config.epsilon())
        for variable, gradient in zip(variables, gradients, strict=True):
            if gradient is not None:
                variable.assign(variable.value + gradient * ops.cast(factor, gradient.dtype))
        with assignments_undone():
            _, gradients = differentiate()
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)
        return result, gradients

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        self.apply_inner(gradients, variables)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"radius": self.radius}
