"""Gradients changed before they are applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from handloom._keras import Tensor, Variable, keras
from handloom.errors import ArgumentError
from handloom.optimizers._wrapper import Wrapper

Gradients: TypeAlias = "list[Tensor | None]"
Transform: TypeAlias = Callable[[Gradients, list[Variable]], Gradients]
"""Takes gradients and their variables; returns as many gradients. `None` is none, before and after."""


@keras.saving.register_keras_serializable("handloom")
class GradientTransforms(Wrapper):
    """Applies transforms to gradients, one after the other, and hands them to another optimizer.

    Around `NamedOptimizers` a transform sees the gradients of all of them: a norm taken there is global.

    Args:
        inner_optimizer: The optimizer that updates.
        transforms: Functions of (gradients, variables) that return gradients, such as
            `handloom.optimizers.ClipByGlobalNorm(1.0)`, or your own.
        name: Name of the optimizer.

    Example:
        `GradientTransforms("sgd", [Centralize(), ClipByGlobalNorm(1.0)])`
    """

    def __init__(self, inner_optimizer: Any, transforms: Sequence[Transform], name: str | None = None) -> None:
        super().__init__(inner_optimizer, name=name)
        self.transforms = list(transforms)
        for transform in self.transforms:
            if not callable(transform):
                raise ArgumentError(
                    f"HL307: A transform is a function of (gradients, variables); received {transform!r}."
                )

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        for transform in self.transforms:
            gradients = _checked(transform(gradients, variables), variables, transform)
        self.apply_inner(gradients, variables)

    @property
    def variables(self) -> list[Variable]:
        own = [variable for transform in self.transforms for variable in getattr(transform, "variables", ())]
        return [*super().variables, *own]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"transforms": keras.saving.serialize_keras_object(self.transforms)}


def _checked(changed: Gradients, variables: list[Variable], transform: Transform) -> Gradients:
    name = getattr(transform, "__name__", type(transform).__name__)
    gradients = list(changed)
    if len(gradients) != len(variables):
        raise ArgumentError(f"HL308: {name} was given {len(variables)} gradients and returned {len(gradients)}.")
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is not None and tuple(gradient.shape) != tuple(variable.shape):
            raise ArgumentError(
                f"HL309: {name} returned a gradient of shape {tuple(gradient.shape)} for {variable.path!r}, which has shape "
                f"{tuple(variable.shape)}.",
            )
    return gradients
