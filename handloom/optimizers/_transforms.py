"""Gradient transforms: values that are called with gradients and their variables, and return gradients.

They compose by standing in a list, know nothing of the backend, and leave `None` (a variable that does not reach the
loss) as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from handloom._keras import Tensor, Variable, keras
from handloom.errors import ArgumentError
from handloom.optimizers._gradient_transforms import Gradients

ops = keras.ops

_T = TypeVar("_T", bound=type)


def _transform(cls: _T) -> _T:
    """A transform that is its own configuration."""
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    made.get_config = lambda self: {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    made.from_config = classmethod(lambda cls, config: cls(**config))
    registered: _T = keras.saving.register_keras_serializable("handloom")(made)
    return registered


def _each(change: Callable[[Tensor], Tensor], gradients: Gradients) -> Gradients:
    return [None if gradient is None else change(gradient) for gradient in gradients]


def _norm(tensor: Tensor, axis: Any = None, keepdims: bool = False) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis, keepdims=keepdims))


def _shrinking(norm: Tensor, limit: Any) -> Tensor:
    """The factor that brings a norm down to a limit; 1 below it."""
    return ops.minimum(1.0, limit / ops.maximum(norm, keras.config.epsilon()))


def global_norm(gradients: Gradients) -> Tensor:
    """The norm of all gradients together: the root of the sum of their squares, in float32."""
    squares = [ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in gradients if gradient is not None]
    return ops.sqrt(sum(squares[1:], start=squares[0])) if squares else ops.zeros(())


def check_positive(name: str, **values: Any) -> None:
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ArgumentError(f"HL327: {name} takes a positive {argument}; received {argument}={value!r}.")


@_transform
class ClipByValue:
    """Limits each entry to lie between `-limit` and `limit`."""

    limit: float

    def __post_init__(self) -> None:
        check_positive("ClipByValue", limit=self.limit)

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        return _each(lambda gradient: ops.clip(gradient, -self.limit, self.limit), gradients)


@_transform
class ClipByNorm:
    """Shrinks each gradient whose norm is above the limit to have just that norm."""

    limit: float

    def __post_init__(self) -> None:
        check_positive("ClipByNorm", limit=self.limit)

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        return _each(lambda gradient: gradient * _shrinking(_norm(gradient), self.limit), gradients)


@_transform
class ClipByGlobalNorm:
    """Shrinks all gradients by one factor, if their norm together is above the limit (Pascanu et al., 2013)."""

    limit: float

    def __post_init__(self) -> None:
        check_positive("ClipByGlobalNorm", limit=self.limit)

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        factor = _shrinking(global_norm(gradients), self.limit)
        return _each(lambda gradient: gradient * ops.cast(factor, gradient.dtype), gradients)


@_transform
class AdaptiveGradientClip:
    """Shrinks the gradient of each unit to at most `ratio` times the norm of its weights.

    A unit is what one output is computed from: all axes but the last. (Brock et al., High-Performance Large-Scale Image
    Recognition Without Normalization, 2021.) Norms of weights below `least` count as `least`, so that what starts
    from zero can move.
    """

    ratio: float = 0.01
    least: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("AdaptiveGradientClip", ratio=self.ratio, least=self.least)

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        return [
            None if gradient is None else self._clipped(gradient, variable.value)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    def _clipped(self, gradient: Tensor, weights: Tensor) -> Tensor:
        axes = tuple(range(len(gradient.shape) - 1)) if len(gradient.shape) > 1 else None
        limit = self.ratio * ops.maximum(_norm(weights, axes, keepdims=True), self.least)
        return gradient * _shrinking(_norm(gradient, axes, keepdims=True), limit)


@_transform
class Centralize:
    """Takes the mean over each unit's inputs off its gradient (Yong et al., Gradient Centralization, 2020).

    Gradients of one axis, such as those of biases, stay as they are.
    """

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        def centered(gradient: Tensor) -> Tensor:
            if len(gradient.shape) < 2:
                return gradient
            return gradient - ops.mean(gradient, axis=tuple(range(len(gradient.shape) - 1)), keepdims=True)

        return _each(centered, gradients)


@_transform
class Multiply:
    """Multiplies gradients by factors for the paths of their variables: the first pattern found in a path counts.

    Example:
        `Multiply({"encoder": 0.1, "bias$": 2.0})` for discriminative learning rates under plain SGD. Optimizers that
        normalize gradients, as Adam does, undo it: there use optimizers by name.
    """

    factors: Mapping[str, float]

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        return [
            gradient if gradient is None else gradient * self._factor(variable.path)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    def _factor(self, path: str) -> float:
        return next((factor for pattern, factor in self.factors.items() if re.search(pattern, path)), 1.0)


@_transform
class Freeze:
    """Leaves the variables whose path has the pattern in it as they are: no update, no decay."""

    pattern: str

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        return [
            None if re.search(self.pattern, variable.path) else gradient
            for gradient, variable in zip(gradients, variables, strict=True)
        ]


@keras.saving.register_keras_serializable("handloom")
class AddNoise:
    """Adds normal noise to the gradients (Neelakantan et al., Adding Gradient Noise, 2015).

    Args:
        stddev: Its standard deviation.
        seed: Seed of the noise.
    """

    def __init__(self, stddev: float, seed: int = 0) -> None:
        check_positive("AddNoise", stddev=stddev)
        self.stddev, self.seed = stddev, seed
        self._generator = keras.random.SeedGenerator(seed)

    def __call__(self, gradients: Gradients, variables: list[Variable]) -> Gradients:
        def noisy(gradient: Tensor) -> Tensor:
            noise = keras.random.normal(gradient.shape, stddev=self.stddev, dtype=gradient.dtype, seed=self._generator)
            return gradient + noise

        return _each(noisy, gradients)

    @property
    def variables(self) -> list[Variable]:
        """The seed that the next noise is drawn from."""
        return [self._generator.state]

    def get_config(self) -> dict[str, Any]:
        return {"stddev": self.stddev, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AddNoise:
        return cls(**config)
