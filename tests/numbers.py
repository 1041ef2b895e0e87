"""Numbers: how tests make and compare them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np


def numpy(value: Any) -> np.ndarray:
    """A tensor, variable, number or list of these as a NumPy array."""
    if isinstance(value, (list, tuple)):
        return np.stack([numpy(item) for item in value]) if value else np.zeros(0)
    return np.asarray(keras.ops.convert_to_numpy(value))


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Fails unless two are alike."""
    np.testing.assert_allclose(numpy(actual), numpy(expected), rtol=rtol, atol=atol)


def same(actual: Any, expected: Any) -> None:
    """Fails unless two are alike in every bit, which tells NaN from NaN no more than Python does."""
    np.testing.assert_array_equal(numpy(actual), numpy(expected))


def each_close(actual: Iterable[Any], expected: Iterable[Any], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Fails unless two equally long lists of arrays, of any shapes, are close pair by pair."""
    for one, other in zip(actual, expected, strict=True):
        close(one, other, rtol, atol)


def each_same(actual: Iterable[Any], expected: Iterable[Any]) -> None:
    """Fails unless two equally long lists of arrays, of any shapes, are bitwise identical pair by pair."""
    for one, other in zip(actual, expected, strict=True):
        same(one, other)


def ones(*shape: int) -> np.ndarray:
    """Ones in single precision."""
    return np.ones(shape, "float32")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normally distributed numbers in single precision, the same each time."""
    return np.random.default_rng(seed).standard_normal(shape, dtype="float32")


def values_of(*things: Any) -> list[np.ndarray]:
    """The values of the variables of models, layers, optimizers or metrics."""
    return [numpy(variable.value) for thing in things for variable in thing.variables]


def same_values(one: Any, other: Any) -> None:
    """Fails unless the variables of two things, or lists of things, hold the same bits."""
    one, other = (thing if isinstance(thing, Sequence) else [thing] for thing in (one, other))
    for left, right in zip(values_of(*one), values_of(*other), strict=True):
        same(left, right)


def finite_differences(fn: Callable[[np.ndarray], Any], x: Any, step: float = 1e-6) -> np.ndarray:
    """The gradient of a scalar function of one array by central differences, in double precision."""
    x = np.asarray(x, "float64")
    steps = step * np.eye(x.size).reshape(x.size, *x.shape)
    return np.reshape([(fn(x + each) - fn(x - each)) / (2 * step) for each in steps], x.shape)
