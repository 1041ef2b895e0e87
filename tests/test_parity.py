"""One file of steps on three backends: equal numbers, compiled and eager, and those of a loop in native PyTorch."""

import itertools

import numpy as np
import pytest

from tests import parity_step
from tests.on_backends import arrays_by_backend

pytestmark = pytest.mark.once

# Equal within 1e-4 of each number, and within 1e-6 of the largest number of an array: a sum that cancels to nearly zero
# keeps the rounding of its terms.
RTOL, ATOL_OF_LARGEST = 1e-4, 1e-6


@pytest.fixture(scope="module")
def start():
    """The first weights of each case."""
    numbers = np.random.default_rng(2)

    def drawn(variable):
        if "variance" in variable.name or "gamma" in variable.name:
            return np.ones(variable.shape, "float32")
        return numbers.normal(scale=0.3, size=variable.shape).astype("float32")

    models = {"classify": parity_step.build_classifier(), "draw": parity_step.GAN()}
    return {case: list(map(drawn, model.weights)) for case, model in models.items()}


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """The results of the six runs by backend and mode, each a dict of arrays by case and name."""
    folder = tmp_path_factory.mktemp("parity")
    by_case = {f"{case}-{index:02}": value for case, values in start.items() for index, value in enumerate(values)}
    np.savez(folder / "start.npz", **by_case)
    found = arrays_by_backend("tests.parity_step", folder, folder / "start.npz")
    return {
        (backend, mode): {key.removeprefix(f"{mode}/"): array for key, array in arrays.items() if key.startswith(mode)}
        for backend, arrays in found.items()
        for mode in ("compiled", "eager")
    }


# The first test here takes about 60 s: it starts three processes of 1,600 steps each, half of them eager.
def test_fit_and_minimize_give_the_same_numbers_on_three_backends_compiled_and_eager(runs):
    for (one, expected), (other, found) in itertools.combinations(runs.items(), 2):
        assert found.keys() == expected.keys()
        for name in found:
            _assert_equal(found[name], expected[name], f"{name}: {other} beside {one}")


def test_fit_and_minimize_move_all_weights_statistics_and_metrics_that_are_compared(runs, start):
    results = next(iter(runs.values()))
    assert results["classify/losses"].shape == results["draw/d_loss"].shape == (parity_step.STEPS,)
    for case, values in start.items():
        for index, value in enumerate(values):
            [name] = [name for name in results if name.startswith(f"{case}/{index} ")]
            assert not np.allclose(results[name], value, atol=1e-3), f"{name} did not move"
    names = " ".join(results)
    for needed in ("accuracy", "mean loss", "certainty", "g_loss", "moving_mean", "moving_variance"):
        assert needed in names


def test_minimize_gives_the_numbers_of_a_loop_in_native_torch(runs, start):
    """Three backends that are all wrong in the same way would be noticed."""
    expected = _classified_by_torch(start["classify"])
    for where, results in runs.items():
        for name, value in expected.items():
            _assert_equal(results[f"classify/{name}"], value, f"{name} on {where}")


def _assert_equal(found, expected, what):
    atol = ATOL_OF_LARGEST * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=atol, err_msg=what)


def _classified_by_torch(start):
    """The classifier of `parity_step`, every formula written out, in double precision."""
    torch = pytest.importorskip("torch")
    step = parity_step
    kernel, gamma, beta, mean, variance, dense, bias = (torch.tensor(value, dtype=torch.float64) for value in start)
    trained = [kernel, gamma, beta, dense, bias]
    for tensor in trained:
        tensor.requires_grad_()
    batches = [(torch.tensor(x.squeeze(-1)).double(), torch.tensor(y).long()) for x, y in step.images()]
    losses, correct = [], 0
    for index in range(step.STEPS):
        x, y = batches[index % step.BATCHES]
        maps = torch.nn.functional.conv2d(x[:, None], kernel.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)
        batch_mean, batch_variance = maps.mean(dim=(0, 1, 2)), maps.var(dim=(0, 1, 2), unbiased=False)
        normal = (maps - batch_mean) / torch.sqrt(batch_variance + 1e-3) * gamma + beta
        logits = torch.log1p(torch.exp(normal)).reshape(len(x), -1) @ dense + bias
        crossentropy = (torch.logsumexp(logits, dim=1) - logits[range(len(y)), y]).mean()
        loss = crossentropy + step.PENALTY * ((kernel**2).sum() + (dense**2).sum())
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for tensor, gradient in zip(trained, gradients, strict=True):
                tensor.sub_(step.RATE * gradient)
            mean, variance = 0.99 * mean + 0.01 * batch_mean, 0.99 * variance + 0.01 * batch_variance
        losses.append(loss.item())
        correct += (logits.argmax(dim=1) == y).sum().item()
    names = "0 kernel", "1 gamma", "2 beta", "3 moving_mean", "4 moving_variance", "5 kernel", "6 bias"
    weights = zip(names, (kernel, gamma, beta, mean, variance, dense, bias), strict=True)
    return {
        "losses": np.array(losses),
        "mean loss": np.mean(losses),
        "accuracy": correct / (step.STEPS * step.BATCH),
        **{name: tensor.detach().numpy() for name, tensor in weights},
    }
