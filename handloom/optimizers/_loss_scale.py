"""Loss scaling for float16, correct whether or not a step remembers it.

Gradients in float16 underflow, so the loss is multiplied by a large number before it is differentiated, and the
gradients divided by it after. (Micikevicius et al., Mixed Precision Training, 2018.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handloom._keras import Tensor, Variable, keras, trained_by
from handloom.backends import backend
from handloom.errors import OptimizerError

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's `LossScaleOptimizer`, which `hl.Model.compile` puts around an optimizer under mixed float16.

    It differs in two ways. Gradients of a loss that never went through `scale_loss` are not divided by the scale
    (with Keras's, a step that forgets to scale learns almost nothing, in silence). And updates work inside compiled
    steps on every backend.

    Args:
        inner_optimizer: The optimizer to wrap.
        initial_scale: The first loss scale.
        dynamic_growth_steps: After so many updates in a row with finite gradients the scale is doubled. A gradient
            that is not finite halves it, and the update is skipped.
        name: Name of the optimizer.

    Attributes:
        skipped: How many updates were skipped, a variable; there once the optimizer is built.
    """

    skipped: Variable

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_was_scaled = False

    def build(self, var_list: Sequence[Variable]) -> None:
        """Creates the slots for these variables."""
        super().build(var_list)
        self.skipped = self.add_variable((), name="skipped", dtype="int32")

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiplies the loss by the present scale; the gradients given to `apply` next are divided by it."""
        self._loss_was_scaled = True
        return super().scale_loss(loss)

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Variable] | None = None) -> None:
        """Updates variables, unless a gradient is not finite.

        Args:
            grads: One gradient, or `None`, a variable; scaled if and only if the loss went through `scale_loss`.
            trainable_variables: The variables; may be left out once the optimizer is built.

        Raises:
            OptimizerError: If the optimizer is not built, and is not told the variables.
        """
        if trainable_variables is None and not self.built:
            raise OptimizerError(
                "HL310: The optimizer is not built, so it cannot tell whose gradients these are. Pass the variables too, or "
                "build it first: optimizer.build(variables).",
            )
        variables = trained_by(self) if trainable_variables is None else list(trainable_variables)
        if not self.built:
            self.build(variables)
        if self._loss_was_scaled:
            grads = unscaled(grads, variables, self.dynamic_scale)
        self._loss_was_scaled = False
        apply_if_finite(self, grads, variables)


def unscaled(gradients: Sequence[Tensor | None], variables: Sequence[Variable], scale: Tensor) -> list[Tensor | None]:
    """Gradients divided by the scale of their loss. What overwrites its variable is no gradient, and is left."""
    return [
        gradient if gradient is None or variable.overwrite_with_gradient else ops.divide(gradient, scale)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def apply_unscaled(
    optimizer: keras.Optimizer, gradients: Sequence[Tensor | None], variables: Sequence[Variable]
) -> None:
    """Hands an optimizer gradients of a loss that is not scaled, or not any more."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        apply_if_finite(optimizer, gradients, variables)
        return
    factor = optimizer.loss_scale_factor
    if factor is not None:  # It will divide by this.
        gradients = [None if gradient is None else ops.multiply(gradient, factor) for gradient in gradients]
    optimizer.apply(gradients, variables)


def apply_if_finite(
    optimizer: keras.optimizers.LossScaleOptimizer, gradients: Sequence[Tensor | None], variables: Sequence[Variable]
) -> None:
    """Lets the inner optimizer update with unscaled gradients, unless one is not finite; adapts the scale."""
    if not optimizer.built:
        optimizer.build(list(variables))
    finite = optimizer.check_finite(gradients)
    backend.cond(finite, lambda: apply_unscaled(optimizer.inner_optimizer, gradients, variables), lambda: None)
    steps = ops.where(finite, optimizer.step_counter + 1, 0)
    grows = ops.equal(steps, optimizer.dynamic_growth_steps)
    factor = ops.where(finite, ops.where(grows, 2.0, 1.0), 0.5)
    optimizer.dynamic_scale.assign(optimizer.dynamic_scale * factor)
    optimizer.step_counter.assign(ops.where(grows, 0, steps))
    if isinstance(optimizer, LossScaleOptimizer):
        optimizer.skipped.assign(optimizer.skipped + ops.cast(ops.logical_not(finite), "int32"))
