"""Measures of quality, compared with their closed forms."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom.report import frechet_distance
from tests.numbers import close

pytestmark = pytest.mark.once


def features(seed, examples=50, size=4):
    numbers = np.random.default_rng(seed)
    return numbers.normal(size=(examples, size)) @ numbers.normal(size=(size, size)) + numbers.normal(size=size)


def by_definition(one, other):
    """With scipy's root of a general matrix."""
    one_covariance, other_covariance = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(one_covariance @ other_covariance).real
    means = np.sum((one.mean(axis=0) - other.mean(axis=0)) ** 2)
    return means + np.trace(one_covariance + other_covariance - 2 * root)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_follows_its_definition_with_a_root_by_scipy(seed):
    one, other = features(seed), features(seed + 100, examples=70)
    close(frechet_distance(one, other), by_definition(one, other), rtol=1e-8)


def test_frechet_distance_of_one_feature_is_the_squared_difference_of_means_and_deviations():
    one, other = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [10.0]])
    expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    close(frechet_distance(one, other), expected, rtol=1e-7)


seeds = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(seeds, seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_frechet_distance_is_symmetric_has_a_squared_unit_and_is_the_square_of_a_shift(one, other, unit, shift):
    one, other = features(one), features(other)
    distance = frechet_distance(one, other)
    assert distance >= 0
    close(frechet_distance(other, one), distance, rtol=1e-6, atol=1e-9)
    # The root of a rounding error is in it.
    close(frechet_distance(unit * one, unit * other), unit**2 * distance, rtol=1e-6, atol=1e-7)
    close(frechet_distance(one, one + shift), 4 * shift**2, rtol=1e-7)


def test_frechet_distance_of_the_same_features_is_zero_also_with_fewer_examples_than_features():
    few = features(3, examples=5, size=20)
    close(frechet_distance(few, few[::-1]), 0, atol=1e-4)


@pytest.mark.parametrize(
    "shapes",
    [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 2, 2), (5, 2, 2))],
)
def test_frechet_distance_names_shapes_that_do_not_match(shapes):
    with pytest.raises(ValueError, match=r"Pass two arrays of shape \(examples, features\)") as caught:
        frechet_distance(*map(np.zeros, shapes))
    assert f"shapes {shapes[0]} and {shapes[1]}" in str(caught.value)
