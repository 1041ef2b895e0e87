"""Loss scaling for float16, correct whether or not a step scales its loss.

Small gradients become zero in float16. The loss is therefore multiplied by a large number before it is differentiated,
and the gradients are divided by it afterwards. (Micikevicius et al., Mixed Precision Training, 2018.)
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from handloom._keras import Gradients, Tensor, Variable, keras, trained_by
from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import ArgumentError, OptimizerError
from handloom.optimizers._tree import inside

ops = keras.ops


@keras.saving.register_keras_serializable("handloom")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's `LossScaleOptimizer`, which `hl.Model.compile` puts around an optimizer under mixed float16.

    It differs in two ways. It divides gradients by the scale only if their loss went through `scale_loss` (with
    Keras's, a step that forgets to scale learns almost nothing, without a warning). And it updates inside compiled
    steps on every backend.

    Args:
        inner_optimizer: The optimizer to wrap.
        initial_scale: The first loss scale.
        dynamic_growth_steps: The number of consecutive updates with finite gradients after which the scale doubles. A
            gradient that is not finite halves the scale, and its update is skipped.
        name: The name of the optimizer.

    Attributes:
        skipped: A variable with the number of skipped updates; exists once the optimizer is built.
    """

    _loss_was_scaled = False

    def __init__(self, inner_optimizer: Any, *args: Any, **options: Any) -> None:
        if isinstance(inner_optimizer, Mapping):
            raise ArgumentError(
                f"HL336: LossScaleOptimizer is around one optimizer; received {short(inner_optimizer)}.",
                fix='Put it around each: {"*": LossScaleOptimizer("adam")}.',
            )
        super().__init__(keras.optimizers.get(inner_optimizer), *args, **options)

    def build(self, var_list: Sequence[Variable]) -> None:
        """Creates the slots for these variables."""
        super().build(var_list)
        self.skipped = self.add_variable((), name="skipped", dtype="int32")

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiplies the loss by the current scale; the next call of `apply` divides the gradients by it."""
        self._loss_was_scaled = True
        return super().scale_loss(loss)

    def apply(self, grads: Gradients, trainable_variables: Sequence[Variable] | None = None) -> None:
        """Updates variables, unless a gradient is not finite.

        Args:
            grads: One gradient, or `None`, per variable; scaled if and only if the loss went through `scale_loss`.
            trainable_variables: The variables; optional once the optimizer is built.

        Raises:
            OptimizerError: The variables are missing and the optimizer is not built.
        """
        variables = built_variables(self, trainable_variables)
        if self._loss_was_scaled:
            grads = unscaled(grads, variables, self.dynamic_scale)
        self._loss_was_scaled = False
        apply_if_finite(self, grads, variables)


def built_variables(optimizer: keras.Optimizer, given: Sequence[Variable] | None) -> list[Variable]:
    """The variables of an update, for which the optimizer is built if it is not; by default all that it trains.

    Raises:
        OptimizerError: None are given, and the optimizer is not built.
    """
    if given is None and not optimizer.built:
        raise OptimizerError(
            f"HL310: {type(optimizer).__name__} is not built, and received gradients without their variables.",
            fix="Pass the variables too, or build it first: optimizer.build(variables).",
        )
    variables = trained_by(optimizer) if given is None else list(given)
    if not optimizer.built:
        optimizer.build(variables)
    return variables


def loss_scale(optimizer: keras.Optimizer) -> Tensor | None:
    """The factor for the loss: the smallest one that an optimizer in the tree asks for."""
    scales = [
        part.dynamic_scale.value if isinstance(part, keras.optimizers.LossScaleOptimizer) else part.loss_scale_factor
        for part in inside(optimizer)
        if part.built
    ]
    asked = [scale for scale in scales if scale is not None]
    return functools.reduce(ops.minimum, asked) if asked else None


def unscaled(gradients: Gradients, variables: list[Variable], scale: Tensor) -> Gradients:
    """Divides gradients by the scale of their loss, except values that overwrite their variable."""
    return [
        gradient if gradient is None or variable.overwrite_with_gradient else ops.divide(gradient, scale)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def apply_unscaled(optimizer: keras.Optimizer, gradients: Gradients, variables: list[Variable]) -> None:
    """Updates variables with the gradients of a loss that is not scaled, or that were divided by its scale."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        apply_if_finite(optimizer, gradients, variables)
        return
    factor = optimizer.loss_scale_factor
    if factor is not None:  # The optimizer will divide by this.
        gradients = [None if gradient is None else ops.multiply(gradient, factor) for gradient in gradients]
    optimizer.apply(gradients, variables)


def apply_if_finite(optimizer: Any, gradients: Gradients, variables: list[Variable]) -> None:
    """Updates with the inner optimizer and unscaled gradients, unless one is not finite; adapts the scale."""
    if not optimizer.built:
        optimizer.build(variables)
    finite = optimizer.check_finite(gradients)
    backend.cond(finite, lambda: apply_unscaled(optimizer.inner_optimizer, gradients, variables), lambda: None)
    steps = ops.where(finite, optimizer.step_counter + 1, 0)
    grows = ops.equal(steps, optimizer.dynamic_growth_steps)
    factor = ops.where(finite, ops.where(grows, 2.0, 1.0), 0.5)
    optimizer.dynamic_scale.assign(optimizer.dynamic_scale * factor)
    optimizer.step_counter.assign(ops.where(grows, 0, steps))
    if isinstance(optimizer, LossScaleOptimizer):
        optimizer.skipped.assign(optimizer.skipped + ops.cast(ops.logical_not(finite), "int32"))
