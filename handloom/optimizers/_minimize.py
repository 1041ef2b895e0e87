"""One update of variables, from a loss function to changed weights, in one readable place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from handloom._keras import Tensor, Variable, keras, layers_of
from handloom._trace.gradients import Wrt, build, gradients_of, gradients_of_each, scalar, variables_of, vector
from handloom._trace.loss_weight import Weight, step_weight, weight_of_step
from handloom._trace.losses import Denominator, Denominators, OwnLosses, note_loss
from handloom._trace.observe import observing
from handloom._util.findings import warn
from handloom.backends import backend
from handloom.distribute._strategy import current
from handloom.errors import GradientError, OptimizerError
from handloom.optimizers._accumulation import GradientAccumulation
from handloom.optimizers._loss_scale import apply_unscaled, unscaled
from handloom.optimizers._named import NamedOptimizers
from handloom.optimizers._options import check_options
from handloom.optimizers._tree import inside, named_inside
from handloom.optimizers._wrapper import Wrapper

ops = keras.ops


def minimize(
    loss_fn: Callable[[], Any],
    wrt: Wrt,
    optimizer: keras.Optimizer,
    *,
    weight: Weight | None = None,
    has_aux: bool = False,
) -> Any:
    """Takes one step of an optimizer down a loss, now.

    The loss that is minimized includes what belongs to the variables and is easily forgotten: the weight
    regularization and the losses added by `add_loss` of the layers in `wrt`, unless `loss_fn` already read them
    (as `layer.losses`, or through `Model.compute_loss`). With a `LossScaleOptimizer` the loss is scaled, and an update
    with a gradient that is not finite is skipped.

    Args:
        loss_fn: Takes nothing; returns the loss, a scalar floating-point tensor, or with `has_aux` a pair of that
            and anything else.
        wrt: What to train: a variable, a layer or model (its trainable variables), or a list, tuple or dict of these.
        optimizer: A Keras optimizer. If it is not built yet, it is built for these variables.
        weight: How much this gradient counts where several are gathered into one update
            (`handloom.optimizers.GradientAccumulation`): what the loss was divided by, such as the number of tokens; a
            number or a scalar tensor. By default what `compute_loss` divided by, or else the number of examples in the
            batch.
        has_aux: Whether `loss_fn` returns a pair.

    Returns:
        The loss before the update, with what was included and unscaled; with `has_aux`, a pair of it and the rest.

    Raises:
        GradientError: If none of the variables reaches the loss, or the loss is no floating-point scalar.
        OptimizerError: If the optimizer was built for other variables.
    """
    build(wrt, loss_fn)
    variables = variables_of(wrt)
    _build_optimizer(optimizer, variables)
    scale = _loss_scale(optimizer)
    if scale is None:
        _warn_of_underflow(wrt)

    differentiate = _Differentiate(loss_fn, wrt, variables, scale, has_aux)
    wraps = isinstance(optimizer, Wrapper)
    taken = optimizer.take_gradients(differentiate, variables) if wraps else differentiate.raw()
    (loss, aux, divided_by), gradients = taken
    _check_reached(gradients, variables)
    weight = _weight(weight, divided_by, optimizer)
    gradients = current().reduce(gradients, weight)
    if scale is not None:
        gradients = unscaled(gradients, variables, scale)
    note_loss(loss, divided_by)
    with step_weight(weight):
        _apply(optimizer, gradients, variables)
    return (loss, aux) if has_aux else loss


@dataclasses.dataclass(frozen=True)
class _Differentiate:
    """A loss function with all that belongs to it, to be differentiated: see `optimizers._wrapper.Differentiate`."""

    loss_fn: Callable[[], Any]
    wrt: Wrt
    variables: list[Variable]
    scale: Tensor | None
    has_aux: bool

    def __call__(self) -> tuple[Any, list[Tensor | None]]:
        result, gradients = self.raw()
        return result, list(map(backend.dense, gradients))

    def raw(self) -> tuple[Any, list[Tensor | None]]:
        """The same, with gradients in the forms that the backend gives them: Keras's optimizers take all of them."""

        def scaled_loss() -> tuple[Tensor, Any]:
            loss, penalties, aux, divided_by = self._parts(scalar)
            loss = sum(penalties, start=loss)
            return self._scaled(loss), (loss, aux, divided_by)

        return gradients_of(scaled_loss, self.variables)

    def each(self) -> tuple[Any, list[list[Tensor | None]], list[Tensor | None]]:
        def scaled_losses() -> tuple[list[Tensor], Any]:
            losses, penalties, aux, divided_by = self._parts(vector)
            penalty = sum(penalties, start=ops.zeros((), losses.dtype))
            scaled = [self._scaled(loss) for loss in [*ops.unstack(losses), penalty]]
            return scaled, (ops.sum(losses) + penalty, aux, divided_by)

        result, [*gradients, of_penalties] = gradients_of_each(scaled_losses, self.variables)
        return result, gradients, of_penalties

    def _parts(self, as_loss: Callable[[Any], Tensor]) -> tuple[Tensor, list[Tensor], Any, list[Denominator]]:
        """The loss, the penalties that belong to it and that its function did not read, the rest, the denominators."""
        layers = [leaf for leaf in keras.tree.flatten(self.wrt) if isinstance(leaf, keras.Layer)]
        denominators, losses = Denominators(), OwnLosses(self.variables, layers)
        with observing(denominators, losses):
            result = backend.with_control_flow(self.loss_fn)()
            loss, aux = _pair(result) if self.has_aux else (result, None)
            loss = as_loss(loss)
            penalties = [ops.cast(ops.sum(penalty), loss.dtype) for penalty in losses.left_out()]
        return loss, penalties, aux, denominators.distinct()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scale is None else loss * ops.cast(self.scale, loss.dtype)


def _weight(given: Weight | None, divided_by: list[Denominator], optimizer: keras.Optimizer) -> Weight:
    """How much the gradient counts: as told, or what the loss was divided by, or the examples in the batch."""
    if given is not None:
        return given
    if len(divided_by) > 1 and any(isinstance(part, GradientAccumulation) for part in inside(optimizer)):
        warn(
            "HL311: The loss has parts that are divided by different sums of masks or weights. Gradients gathered over "
            "several steps then count by examples; to weight them otherwise, pass minimize(..., weight=...).",
        )
    return divided_by[0].value if len(divided_by) == 1 else weight_of_step()


def _build_optimizer(optimizer: Any, variables: list[Variable]) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise OptimizerError(
            f"HL312: minimize() takes a Keras optimizer; received {optimizer!r} (of type {type(optimizer).__name__}). "
            "For example: keras.optimizers.Adam(1e-3).",
        )
    check_options(optimizer)
    if optimizer.use_ema and optimizer.gradient_accumulation_steps:
        raise OptimizerError(
            f"HL313: {type(optimizer).__name__} has use_ema and gradient_accumulation_steps: Keras moves the averages on "
            "steps that update nothing. Have handloom.optimizers.GradientAccumulation(optimizer, "
            f"{optimizer.gradient_accumulation_steps}) accumulate, and not the optimizer itself.",
        )
    if not optimizer.built and not isinstance(optimizer, NamedOptimizers):
        optimizer.build(variables)
    for named in named_inside(optimizer):
        named.split(variables)


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise GradientError(
            f"HL123: With has_aux=True the loss function must return a pair (loss, aux); received {type(result).__name__}.",
        )
    return result


def _loss_scale(optimizer: keras.Optimizer) -> Tensor | None:
    """The factor for the loss: the smallest that any of the optimizers asks for."""
    scales = [
        part.dynamic_scale.value if isinstance(part, keras.optimizers.LossScaleOptimizer) else part.loss_scale_factor
        for part in inside(optimizer)
        if part.built
    ]
    asked = [scale for scale in scales if scale is not None]
    return functools.reduce(ops.minimum, asked) if asked else None


def _warn_of_underflow(wrt: Wrt) -> None:
    layers = [leaf for leaf in keras.tree.flatten(wrt) if isinstance(leaf, keras.Layer)]
    half = next((inner for layer in layers for inner in layers_of(layer) if inner.compute_dtype == "float16"), None)
    if half is not None:
        warn(
            f"HL314: The layer {half.name!r} computes in float16, but no optimizer scales the loss: small gradients become "
            "zero. Wrap the optimizer: handloom.optimizers.LossScaleOptimizer(optimizer).",
        )


def _apply(optimizer: keras.Optimizer, gradients: list[Tensor | None], variables: list[Variable]) -> None:
    """Hands unscaled gradients to an optimizer, which clips and applies them."""
    try:
        apply_unscaled(optimizer, gradients, variables)
    except ValueError as error:
        if "Unknown variable" not in str(error):
            raise
        raise OptimizerError(
            f"HL315: The optimizer {optimizer.name!r} was built for other variables than {[v.path for v in variables]}. Use "
            "one optimizer for each part, or build it for all parts first: optimizer.build([*a, *b]). If some of them "
            "came, or were thawed, later: handloom.optimizers.add_variables(optimizer, model), and compile the "
            "step anew.",
        ) from error


def _check_reached(gradients: Sequence[Tensor | None], variables: Sequence[Variable]) -> None:
    if all(gradient is None for gradient in gradients):
        raise GradientError(
            f"HL124: None of the variables to train reaches the loss: {', '.join(variable.path for variable in variables)}. "
            "The loss function must itself call the layers that it trains (what was computed outside of it is a "
            "constant), through differentiable operations only (no argmax, round, comparison or stop_gradient).",
        )
