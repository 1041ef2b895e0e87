"""One update of variables, from a loss function to changed weights."""

import contextlib
from collections.abc import Callable
from typing import Any

from handloom._keras import Gradients, Variable, has_value, keras, layers_of
from handloom._trace.gradients import Wrt, build, variables_of
from handloom._trace.loss_weight import SUM, Weight, step_weight, weight_of_step
from handloom._trace.losses import Denominator, note_loss
from handloom._util.findings import warn
from handloom._util.first_few import first_few
from handloom._util.short import short
from handloom.distribute._strategy import current
from handloom.errors import ArgumentError, GradientError, OptimizerError
from handloom.optimizers._accumulation import GradientAccumulation
from handloom.optimizers._add_variables import add_unfrozen, at_once
from handloom.optimizers._loss_function import LossFunction
from handloom.optimizers._loss_scale import apply_unscaled, loss_scale, unscaled
from handloom.optimizers._named import NamedOptimizers
from handloom.optimizers._tree import check_options, inside, taker_inside


def minimize(
    loss_fn: Callable[[], Any],
    wrt: Wrt,
    optimizer: keras.Optimizer,
    *,
    weight: Weight | None = None,
    has_aux: bool = False,
) -> Any:
    """Takes one step of an optimizer down a loss, now.

    The loss includes the penalties of the variables, which are easily forgotten: the weight regularization, and the
    losses added by `add_loss` in the layers of `wrt`. Each counts once: a penalty that `loss_fn` includes in the loss
    itself (from `layer.losses`, or through `Model.compute_loss`) is not added to it, one that it only reports is. A
    penalty behind `ops.stop_gradient` is not in the loss; to leave one out, multiply it by 0. With a
    `LossScaleOptimizer` the loss is scaled, and an update with a gradient that is not finite is skipped.

    Args:
        loss_fn: Takes no arguments; returns the loss, a scalar floating-point tensor, or with `has_aux` a pair of it
            and anything else.
        wrt: What to train: a variable, a layer or model (its trainable variables), or a list, tuple or dict of these.
        optimizer: A Keras optimizer. If it is not built yet, it is built for these variables.
        weight: The weight of this gradient where several are accumulated into one update
            (`handloom.optimizers.GradientAccumulation`): the number that the loss was divided by, such as the number of
            tokens, as a number or scalar tensor. By default the number that `compute_loss` divided by, or else the
            number of examples in the batch.
        has_aux: Whether `loss_fn` returns a pair.

    Returns:
        The loss before the update, with its penalties and unscaled; with `has_aux`, a pair of it and the rest.

    Raises:
        GradientError: None of the variables reaches the loss, or the loss is not a floating-point scalar.
        OptimizerError: The optimizer was built for other variables.
    """
    if not callable(loss_fn):
        raise GradientError(
            f"HL338: minimize() takes a function that returns the loss; received an object of type "
            f"{type(loss_fn).__name__}.",
            fix="Call the model inside it: minimize(lambda: loss(y, model(x)), model, optimizer).",
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise OptimizerError(
            f"HL312: minimize() takes a Keras optimizer; received {short(optimizer)} (of type "
            f"{type(optimizer).__name__}).",
            fix="Pass minimize(loss_fn, wrt, optimizer), with an optimizer such as keras.optimizers.Adam(1e-3).",
        )
    build(wrt, loss_fn)
    variables = variables_of(wrt)
    _build_optimizer(optimizer, wrt, variables)
    scale = loss_scale(optimizer)
    if scale is None:
        _warn_of_underflow(wrt)
    loss_function = LossFunction(loss_fn, wrt, variables, scale, has_aux)
    taker = taker_inside(optimizer)
    result, gradients = taker.take_gradients(loss_function) if taker else loss_function.gradients()
    loss, aux, divided_by = result
    _check_reached(gradients, variables)
    weight = _weight(weight, divided_by, optimizer)
    gradients = current().reduce(gradients, weight)
    if scale is not None:
        gradients = unscaled(gradients, variables, scale)
    note_loss(loss, divided_by)
    with step_weight(weight):
        _apply(optimizer, gradients, variables)
    return (loss, aux) if has_aux else loss


def _build_optimizer(optimizer: Any, wrt: Wrt, variables: list[Variable]) -> None:
    check_options(optimizer)
    steps = optimizer.gradient_accumulation_steps
    if optimizer.use_ema and steps:
        raise OptimizerError(
            f"HL313: {type(optimizer).__name__} has both use_ema and gradient_accumulation_steps.",
            "Keras moves the averages on steps that update nothing.",
            f"Leave out the latter, and use handloom.optimizers.GradientAccumulation(optimizer, {steps}).",
        )
    with at_once() if all(map(has_value, variables)) else contextlib.nullcontext():
        if not optimizer.built:
            optimizer.build(variables)
        for named in inside(optimizer, NamedOptimizers):
            named.split(variables)
    add_unfrozen(optimizer, wrt)


def _weight(given: Weight | None, divided_by: list[Denominator], optimizer: keras.Optimizer) -> Weight:
    """The weight of the gradient: as given, or what the loss was divided by, or the examples in the batch."""
    if given is not None:
        if (isinstance(given, str) and given != SUM) or len(getattr(given, "shape", ())):
            raise ArgumentError(
                f"HL337: minimize(weight=...) takes a number or a scalar tensor; received {short(given)}."
            )
        return given
    if len(divided_by) > 1 and any(inside(optimizer, GradientAccumulation)):
        warn(
            "HL311: Parts of the loss are divided by different sums of masks or weights.",
            "Accumulated gradients are therefore weighted by the number of examples.",
            "For other weights, pass minimize(..., weight=...).",
        )
    return divided_by[0].value if len(divided_by) == 1 else weight_of_step()


def _warn_of_underflow(wrt: Wrt) -> None:
    layers = [leaf for leaf in keras.tree.flatten(wrt) if isinstance(leaf, keras.Layer)]
    half = next((inner for layer in layers for inner in layers_of(layer) if inner.compute_dtype == "float16"), None)
    if half is not None:
        warn(
            f"HL314: The layer {half.name!r} computes in float16, but no optimizer scales the loss.",
            "Small gradients become zero.",
            "Wrap the optimizer: handloom.optimizers.LossScaleOptimizer(optimizer).",
        )


def _apply(optimizer: keras.Optimizer, gradients: Gradients, variables: list[Variable]) -> None:
    """Updates with unscaled gradients, which the optimizer may clip."""
    try:
        apply_unscaled(optimizer, gradients, variables)
    except ValueError as error:
        if "Unknown variable" not in str(error):
            raise
        raise OptimizerError(
            f"HL315: The optimizer {optimizer.name!r} was built for others than "
            f"{first_few([variable.path for variable in variables], 5)}.",
            fix="Use one optimizer per part, or build it for all parts: optimizer.build([*a, *b]). For variables added "
            "later, call handloom.optimizers.add_variables(optimizer, model).",
        ) from error


def _check_reached(gradients: Gradients, variables: list[Variable]) -> None:
    if all(gradient is None for gradient in gradients):
        raise GradientError(
            f"HL124: None of the variables reaches the loss: {', '.join(variable.path for variable in variables)}.",
            "Results that were computed outside of the loss function are constants.",
            "Call the layers inside it, without operations that stop gradients: argmax, round, stop_gradient.",
        )
