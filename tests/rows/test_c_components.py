"""Rows C: own components."""

import numpy as np
import pytest

from tests.rows import curves
from tests.rows.real_data import diabetes


def reconstructing_regressor_by_hand():
    """The run `curves.c7` in NumPy: loss and error of the reconstruction by epoch."""
    x, y = (array[:440].astype("float64") for array in diabetes())
    weights = [weight.astype("float64") for weight in curves.start((10, 8), 8, (8, 1), 1, (8, 10), 10)]
    losses, errors = [], []
    for _ in range(8):
        for x_batch, y_batch in zip(np.split(x, 5), np.split(y, 5), strict=True):
            w1, b1, w2, b2, w3, b3 = weights
            hidden = np.tanh(x_batch @ w1 + b1)
            off, lost = hidden @ w2 + b2 - y_batch, hidden @ w3 + b3 - x_batch
            errors.append((lost**2).mean())
            losses.append((off**2).mean() + 0.05 * errors[-1])
            d_off, d_lost = 2 * off / off.size, 0.05 * 2 * lost / lost.size
            d_hidden = (d_off @ w2.T + d_lost @ w3.T) * (1 - hidden**2)
            inputs_and_slopes = [(x_batch, d_hidden), (hidden, d_off), (hidden, d_lost)]
            gradients = [part for inputs, slope in inputs_and_slopes for part in (inputs.T @ slope, slope.sum(axis=0))]
            weights = [weight - 0.1 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    by_epoch = [np.reshape(values, (8, 5)).mean(axis=1) for values in (losses, errors)]
    return dict(zip(("loss", "reconstruction_error"), by_epoch, strict=True))


@pytest.mark.parametrize("kind", [curves.ReconstructingRegressor, curves.WithAnOwnStep])
def test_c7_a_reconstruction_loss_by_add_loss_and_its_error_as_a_metric_fall_as_in_numpy(kind):
    found, expected = curves.c7(kind), reconstructing_regressor_by_hand()
    assert found.keys() == expected.keys()
    for name, curve in found.items():
        assert (np.diff(curve) < 0).all()
        np.testing.assert_allclose(curve, expected[name], rtol=1e-4)


@pytest.mark.once  # Starts three processes.
def test_c7_a_reconstruction_loss_is_identical_on_three_backends():
    found = curves.on_three_backends()
    for name in ("c7/loss", "c7/reconstruction_error"):
        for backend in found:
            np.testing.assert_allclose(found[backend][name], found["jax"][name], rtol=1e-4, err_msg=backend)
