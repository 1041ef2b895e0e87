"""What `compile` makes of an optimizer, and what a model does with the one it was compiled with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from handloom._keras import keras, share_learning_rate, trained_by
from handloom._model.steps import parts_built
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation, LossScaleOptimizer, NamedOptimizers
from handloom.optimizers._named import as_optimizer
from handloom.optimizers._options import check_options
from handloom.optimizers._tree import named_inside


def prepared(optimizer: Any, policy: keras.DTypePolicy, *, auto_scale_loss: bool) -> keras.Optimizer | None:
    """The optimizer of a model, from what was given for it.

    Args:
        optimizer: An optimizer, its name, a dict of several, or `None`.
        policy: The model's dtype policy.
        auto_scale_loss: Whether to scale the loss under the policy `mixed_float16`.

    Raises:
        OptimizerError: If it has an option that makes no sense.
    """
    if optimizer is None:
        return None
    optimizer = as_optimizer(optimizer)
    check_options(optimizer)
    changed = _each(optimizer, _accumulating)
    return _each(changed, _scaling) if auto_scale_loss and policy.name == "mixed_float16" else changed


def attach(optimizer: keras.Optimizer | None, model: keras.Model) -> None:
    """Tells optimizers by name whose names they have."""
    for named in named_inside(optimizer):
        named.attach(model)
        if parts_built(model):
            named.owners()


def compiled_optimizer(model: keras.Model) -> keras.Optimizer:
    """The optimizer that a model was compiled with.

    Raises:
        OptimizerError: If there is none.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise OptimizerError(
            f"HL333: {type(model).__name__} has no optimizer. Compile it with one, compile(optimizer='adam', ...), or pass "
            "one: minimize(..., optimizer=...).",
        )
    return optimizer


def build(optimizer: keras.Optimizer, model: keras.Model) -> None:
    """Builds an optimizer, with all that it wraps or names, for a model that is built."""
    optimizer.build(model.trainable_variables)
    for named in named_inside(optimizer):
        named.build(model.trainable_variables)


def finish_training(model: keras.Model) -> None:
    """What an optimizer does at the end of training: Keras's own put their averages in the place of the weights."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        optimizer.finalize_variable_values(trained_by(optimizer))


def _each(optimizer: keras.Optimizer, change: Callable[[keras.Optimizer], keras.Optimizer]) -> keras.Optimizer:
    return optimizer.with_each(change) if isinstance(optimizer, NamedOptimizers) else change(optimizer)


def _accumulating(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Does by `GradientAccumulation` what a Keras optimizer was asked to do as `gradient_accumulation_steps`.

    The optimizer given stays as it is; a copy is wrapped, which has its learning rate.

    Keras's way counts batches alike whatever their size, leaves a last short window waiting, and moves the averages of
    `use_ema` on steps that update nothing.
    """
    steps = optimizer.gradient_accumulation_steps
    if not steps:
        return optimizer
    if optimizer.built:
        raise OptimizerError(
            f"HL334: {optimizer.name!r} has gradient_accumulation_steps={steps} and is built already. compile() replaces such "
            "an optimizer by GradientAccumulation around a copy of it, which would not have its slots. Pass a new one, "
            f"or GradientAccumulation(optimizer, {steps}) around one without gradient_accumulation_steps.",
        )
    copy = type(optimizer).from_config(optimizer.get_config() | {"gradient_accumulation_steps": None})
    share_learning_rate(copy, optimizer)
    return GradientAccumulation(copy, steps)


def _scaling(optimizer: keras.Optimizer) -> keras.Optimizer:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
