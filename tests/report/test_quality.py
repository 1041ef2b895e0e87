"""Figures of quality against their closed forms."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom.report import frechet_distance

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
def test_it_is_what_its_definition_gives_with_a_root_by_scipy(seed):
    one, other = features(seed), features(seed + 100, examples=70)
    np.testing.assert_allclose(frechet_distance(one, other), by_definition(one, other), rtol=1e-8)


def test_of_one_feature_it_is_the_difference_of_means_and_of_deviations_squared():
    one, other = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [10.0]])
    expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    np.testing.assert_allclose(frechet_distance(one, other), expected)


def test_it_finds_the_distance_of_two_normal_distributions_from_samples():
    numbers = np.random.default_rng(0)
    one = numbers.normal(0, [1, 2, 3], size=(200_000, 3))
    other = numbers.normal([1, 0, -2], [2, 2, 1], size=(200_000, 3))
    np.testing.assert_allclose(frechet_distance(one, other), 1 + 4 + (1 - 2) ** 2 + (3 - 1) ** 2, rtol=0.02)


seeds = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(seeds, seeds)
def test_it_is_symmetric_and_not_negative(one, other):
    there, back = frechet_distance(features(one), features(other)), frechet_distance(features(other), features(one))
    assert there >= 0
    np.testing.assert_allclose(there, back, rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-5, 5))
def test_of_a_shifted_copy_it_is_the_shift_squared(seed, shift):
    one = features(seed)
    np.testing.assert_allclose(frechet_distance(one, one + shift), 4 * shift**2, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, seeds, st.floats(0.1, 10))
def test_its_unit_is_the_square_of_the_features(one, other, unit):
    expected = unit**2 * frechet_distance(features(one), features(other))
    found = frechet_distance(unit * features(one), unit * features(other))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)  # The root of a rounding error is in it.


def test_it_is_zero_for_the_same_features_also_with_fewer_examples_than_features():
    few = features(3, examples=5, size=20)
    np.testing.assert_allclose(frechet_distance(few, few[::-1]), 0, atol=1e-4)


@pytest.mark.parametrize(
    "shapes",
    [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 2, 2), (5, 2, 2))],
)
def test_shapes_that_do_not_go_together_are_refused_by_name(shapes):
    with pytest.raises(ValueError, match=r"takes two arrays \(examples, features\)") as caught:
        frechet_distance(*map(np.zeros, shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)
