"""The optimizer of a compiled model: by name, with gradient accumulation, and with automatic loss scaling."""

from typing import Any

from handloom._keras import keras, share_learning_rate, trained_by
from handloom._model.steps import layers_are_built
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation, LossScaleOptimizer, NamedOptimizers
from handloom.optimizers._named import as_optimizer
from handloom.optimizers._tree import check_options, inside


def prepared(optimizer: Any, policy: keras.DTypePolicy, *, auto_scale_loss: bool) -> keras.Optimizer | None:
    """Makes the optimizer of a model from the one given to `compile`.

    Args:
        optimizer: An optimizer, its name, a dict of several, or `None`.
        policy: The dtype policy of the model.
        auto_scale_loss: Whether to scale the loss under the policy `mixed_float16`.

    Raises:
        OptimizerError: An option of the optimizer makes no sense.
    """
    if optimizer is None:
        return None
    optimizer = as_optimizer(optimizer)
    check_options(optimizer)
    scales = auto_scale_loss and policy.name == "mixed_float16"

    def wrapped(inner: keras.Optimizer) -> keras.Optimizer:
        inner = _with_accumulation(inner)
        if not scales or isinstance(inner, keras.optimizers.LossScaleOptimizer):
            return inner
        return LossScaleOptimizer(inner, name="loss_scale_optimizer")

    return optimizer.with_each(wrapped) if isinstance(optimizer, NamedOptimizers) else wrapped(optimizer)


def attach(optimizer: keras.Optimizer | None, model: keras.Model) -> None:
    """Tells optimizers by name which model their names refer to, and checks the names if its layers are built."""
    for named in inside(optimizer, NamedOptimizers):
        named.attach(model)
        if layers_are_built(model):
            named.owners()


def compiled_optimizer(model: keras.Model) -> keras.Optimizer:
    """The optimizer that a model was compiled with.

    Raises:
        OptimizerError: There is none.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise OptimizerError(
            f"HL333: {type(model).__name__} has no optimizer.",
            fix="Compile it with one: compile(optimizer='adam', ...). Or pass one: minimize(..., optimizer=...).",
        )
    return optimizer


def build_optimizer(model: keras.Model) -> None:
    """Builds the optimizer of a built model, with all optimizers that it wraps or names."""
    model.optimizer.build(model.trainable_variables)
    for named in inside(model.optimizer, NamedOptimizers):
        named.build(model.trainable_variables)


def finish_training(model: keras.Model) -> None:
    """Lets the optimizer finish: Keras's own, with `use_ema`, replace the weights by their averages."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        optimizer.finalize_variable_values(trained_by(optimizer))


def _with_accumulation(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Replaces the `gradient_accumulation_steps` of a Keras optimizer by `GradientAccumulation` around a copy.

    The optimizer given does not change; the copy shares its learning rate.

    Keras weighs all batches the same whatever their size, leaves a last, shorter window without an update, and moves
    the averages of `use_ema` on steps without an update.
    """
    steps = optimizer.gradient_accumulation_steps
    if not steps:
        return optimizer
    if optimizer.built:
        raise OptimizerError(
            f"HL334: {optimizer.name!r} has gradient_accumulation_steps={steps} and is already built.",
            "compile() replaces it by GradientAccumulation around a copy, and the copy would not have its slots.",
            f"Pass a new optimizer, or GradientAccumulation(optimizer, {steps}) around an optimizer without "
            "gradient_accumulation_steps.",
        )
    copy = type(optimizer).from_config(optimizer.get_config() | {"gradient_accumulation_steps": None})
    share_learning_rate(copy, optimizer)
    return GradientAccumulation(copy, steps)
