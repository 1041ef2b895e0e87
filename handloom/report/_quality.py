"""Figures of quality."""

from __future__ import annotations

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
        The distance, in the square of the features' unit; 0 for two sets of the same mean and covariance.

    Raises:
        ValueError: If the shapes do not go together.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ArgumentError(
            "HL034: frechet_distance takes two arrays (examples, features) with the same number of features and at least two "
            f"examples each; received shapes {one.shape} and {other.shape}.",
        )
    means = one.mean(axis=0), other.mean(axis=0)
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = _root(np.atleast_2d(covariances[0]))
    # (C1 C2)^(1/2) has the trace of (R C2 R)^(1/2) with R = C1^(1/2), which is symmetric.
    cross = _root(root @ np.atleast_2d(covariances[1]) @ root)
    distance = np.sum((means[0] - means[1]) ** 2) + np.trace(np.atleast_2d(covariances[0] + covariances[1]))
    return float(max(distance - 2 * np.trace(cross), 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric, positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
