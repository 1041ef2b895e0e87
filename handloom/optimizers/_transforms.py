"""Gradient transforms, and the optimizer that applies them.

A transform is a plain object, called with gradients and their variables. It leaves `None`, the gradient of a variable
that does not reach the loss, as it is, and does not depend on the backend.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias, dataclass_transform

from handloom._keras import Gradients, Tensor, Variable, keras
from handloom._util.arguments import positive_number
from handloom._util.short import short
from handloom.errors import ArgumentError
from handloom.optimizers._wrapper import Wrapper

ops = keras.ops

Transform: TypeAlias = Callable[[Gradients, list[Variable]], Gradients]
"""Takes gradients and their variables, and returns as many gradients. An attribute `variables` lists its state."""


@keras.saving.register_keras_serializable("handloom")
class GradientTransforms(Wrapper):
    """Applies transforms to gradients, one after the other, and passes them to another optimizer.

    Around `NamedOptimizers` a transform receives the gradients of all of them, so that a norm is global. A subclass
    with a method `take_gradients(loss)` takes the gradients itself: the method calls `loss.gradients()` as often as it
    needs, and returns the result of one such call, with the gradients to use.

    Args:
        inner_optimizer: The optimizer that updates.
        transforms: Functions of (gradients, variables) that return gradients, such as
            `handloom.optimizers.ClipByGlobalNorm(1.0)`, or your own; several, or one.
        name: The name of the optimizer.

    Raises:
        ArgumentError: A transform is not a function, or, at an update, returns gradients of another number or shape.

    Example:
        `GradientTransforms("sgd", [Centralize(), ClipByGlobalNorm(1.0)])`
    """

    options = ("transforms",)

    def __init__(
        self, inner_optimizer: Any, transforms: Sequence[Transform] | Transform, name: str | None = None
    ) -> None:
        super().__init__(inner_optimizer, name=name)
        self.transforms = list(transforms) if isinstance(transforms, Sequence) else [transforms]
        for transform in self.transforms:
            if not callable(transform):
                raise ArgumentError(f"HL307: A transform takes gradients and variables; received {short(transform)}.")

    def update(self, gradients: Gradients, variables: list[Variable]) -> None:
        for transform in self.transforms:
            gradients = _checked(transform(gradients, variables), variables, transform)
        super().update(gradients, variables)

    @property
    def variables(self) -> list[Variable]:
        own = [variable for transform in self.transforms for variable in getattr(transform, "variables", ())]
        return [*super().variables, *own]


def _checked(changed: Gradients, variables: list[Variable], transform: Transform) -> Gradients:
    name = getattr(transform, "__name__", type(transform).__name__)
    gradients = list(changed)
    if len(gradients) != len(variables):
        raise ArgumentError(f"HL308: {name} received {len(variables)} gradients and returned {len(gradients)}.")
    for gradient, variable in zip(gradients, variables, strict=True):
        shape, expected = tuple(getattr(gradient, "shape", variable.shape)), tuple(variable.shape)
        if shape != expected:
            raise ArgumentError(f"HL309: {name} returned shape {shape} for {variable.path!r}, of shape {expected}.")
    return gradients


class _EachGradient:
    """A transform that changes each gradient by itself."""

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        pairs = zip(gradients, variables, strict=True)
        return [None if gradient is None else self._changed(gradient, variable) for gradient, variable in pairs]

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor | None:
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)


@dataclass_transform(frozen_default=True)
class _Transform(_EachGradient):
    """The base of transforms with a configuration: dataclasses, registered with Keras, whose numbers are positive."""

    def __init_subclass__(cls) -> None:
        keras.saving.register_keras_serializable("handloom")(dataclasses.dataclass(frozen=True)(cls))

    def __post_init__(self) -> None:
        for name, kind in type(self).__annotations__.items():
            if kind is float:
                positive_number(type(self).__name__, **{name: getattr(self, name)})
            else:
                _check_patterns(type(self).__name__, getattr(self, name))

    def get_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).__annotations__}


def _check_patterns(of: str, patterns: Any) -> None:
    try:
        for pattern in [patterns] if isinstance(patterns, str) else dict(patterns):
            re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise ArgumentError(
            f"HL335: {of} takes regular expressions for paths of variables; received {short(patterns)}: {error}.",
            fix='For example: Freeze("encoder") or Scale({"encoder": 0.1}).',
        ) from error


def _norm(tensor: Tensor, axis: Any = None, keepdims: bool = False) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis, keepdims=keepdims))


def _shrinking(norm: Tensor, limit: Any) -> Tensor:
    """The factor that reduces a norm to a limit; 1 below it."""
    return ops.minimum(1.0, limit / ops.maximum(norm, keras.config.epsilon()))


def global_norm(gradients: Gradients) -> Tensor:
    """The norm of all gradients together: the root of the sum of their squares, in float32."""
    squares = [ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in gradients if gradient is not None]
    return ops.sqrt(sum(squares[1:], start=squares[0])) if squares else ops.zeros(())


class ClipByValue(_Transform):
    """Limits each entry to the range from `-limit` to `limit`."""

    limit: float

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor:
        return ops.clip(gradient, -self.limit, self.limit)


class ClipByNorm(_Transform):
    """Shrinks each gradient whose norm is above the limit to that norm."""

    limit: float

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor:
        return gradient * _shrinking(_norm(gradient), self.limit)


class ClipByGlobalNorm(_Transform):
    """Shrinks all gradients by one factor, if their norm together is above the limit (Pascanu et al., 2013)."""

    limit: float

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        factor = _shrinking(global_norm(gradients), self.limit)
        return [None if gradient is None else gradient * ops.cast(factor, gradient.dtype) for gradient in gradients]


class AdaptiveGradientClip(_Transform):
    """Shrinks the gradient of each unit to at most `ratio` times the norm of its weights.

    The weights of a unit are those of one output: all axes but the last. (Brock et al., High-Performance Large-Scale
    Image Recognition Without Normalization, 2021.) Norms of weights below `least` count as `least`, so that weights
    that start at zero can move.
    """

    ratio: float = 0.01
    least: float = 1e-3

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor:
        axes = tuple(range(len(gradient.shape) - 1)) or None
        limit = self.ratio * ops.maximum(_norm(variable.value, axes, keepdims=True), self.least)
        return gradient * _shrinking(_norm(gradient, axes, keepdims=True), limit)


class Centralize(_Transform):
    """Subtracts the mean over the inputs of each unit from its gradient (Yong et al., Gradient Centralization, 2020).

    Gradients with one axis, such as those of biases, stay as they are.
    """

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor:
        axes = tuple(range(len(gradient.shape) - 1))
        return gradient - ops.mean(gradient, axis=axes, keepdims=True) if axes else gradient


class Scale(_Transform):
    """Multiplies gradients by factors for the paths of their variables; the first pattern found in a path counts.

    Example:
        `Scale({"encoder": 0.1, "bias$": 2.0})` for discriminative learning rates with plain SGD. Optimizers that
        normalize gradients, as Adam does, cancel the factors: use optimizers by name with those.
    """

    factors: Mapping[str, float]

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor:
        found = (factor for pattern, factor in self.factors.items() if re.search(pattern, variable.path))
        return gradient * next(found, 1.0)


class Freeze(_Transform):
    """Excludes the variables whose path contains the pattern from updates, weight decay included."""

    pattern: str

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor | None:
        return None if re.search(self.pattern, variable.path) else gradient


@keras.saving.register_keras_serializable("handloom")
class AddNoise(_EachGradient):
    """Adds normal noise to the gradients (Neelakantan et al., Adding Gradient Noise, 2015).

    Args:
        stddev: The standard deviation of the noise.
        seed: The seed of the noise.
    """

    def __init__(self, stddev: float, seed: int = 0) -> None:
        self.stddev, self.seed = positive_number("AddNoise", stddev=stddev), seed
        self._generator = keras.random.SeedGenerator(seed)

    def _changed(self, gradient: Tensor, variable: Variable) -> Tensor:
        noise = keras.random.normal(gradient.shape, stddev=self.stddev, dtype=gradient.dtype, seed=self._generator)
        return gradient + noise

    @property
    def variables(self) -> list[Variable]:
        """The state of the random generator."""
        return [self._generator.state]

    def get_config(self) -> dict[str, Any]:
        return {"stddev": self.stddev, "seed": self.seed}
