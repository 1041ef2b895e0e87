"""Measures of the quality of generated examples."""

import numpy as np

from handloom.errors import ArgumentError


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The Fréchet distance between two sets of features, each taken as normally distributed.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, with means m and covariances C. (Dowson and Landau, 1982; as a
    measure of generated images Heusel et al., 2017.)

    Args:
        one: Features, shape `(examples, features)`, at least two examples.
        other: Features, shape `(examples, features)`.

    Returns:
        The distance, in the square of the features' unit; 0 for two sets with the same mean and covariance.

    Raises:
        ArgumentError: The shapes do not match, or a set has fewer than two examples.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ArgumentError(
            f"HL034: frechet_distance received arrays of shapes {one.shape} and {other.shape}.",
            fix="Pass two arrays of shape (examples, features), with the same number of features and at least two "
            "examples each.",
        )
    means = one.mean(axis=0), other.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (one, other)]
    # (C1 C2)^(1/2) has the trace of (R C2 R)^(1/2) with R = C1^(1/2), which is symmetric.
    root = _root(covariances[0])
    cross = _root(root @ covariances[1] @ root)
    distance = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1])
    return float(max(distance - 2 * np.trace(cross), 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric, positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
