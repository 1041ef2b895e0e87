"""One step file on three backends: the same numbers, compiled and op by op, and those of a loop in native PyTorch."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import parity_step

BACKENDS = ("jax", "tensorflow", "torch")
MODES = ("compiled", "op by op")

# Equal within 1e-4 of each number; and, since a sum that cancels out to nearly zero keeps the rounding of what was
# summed, within 1e-6 of the size of an array's largest number.
RTOL, ATOL_OF_LARGEST = 1e-4, 1e-6


@pytest.fixture(scope="module")
def start():
    """Weights to start from, for each case."""
    numbers = np.random.default_rng(2)
    models = {"classify": parity_step.build_classifier(), "draw": parity_step.GAN()}
    return {case: [_drawn(variable, numbers) for variable in model.weights] for case, model in models.items()}


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """The results of the six runs by backend and mode, each a dict of arrays by case and name."""
    folder = tmp_path_factory.mktemp("parity")
    np.savez(
        folder / "start.npz",
        **{f"{case}-{index:02}": value for case, values in start.items() for index, value in enumerate(values)},
    )
    processes = {backend: _started(backend, folder) for backend in BACKENDS}
    for backend, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"on {backend}:\n{output}"
    found = {}
    for backend in BACKENDS:
        with np.load(folder / f"{backend}.npz") as loaded:
            for mode in MODES:
                found[backend, mode] = {
                    key.removeprefix(f"{mode}/"): loaded[key] for key in loaded if key.startswith(mode)
                }
    return found


# The first test here takes about 60 s: it starts three processes, which take 1,600 steps each, half of them op by op.
@pytest.mark.once
@pytest.mark.parametrize("case", ["classify", "draw"])
def test_two_hundred_steps_give_the_same_numbers_on_three_backends_compiled_and_op_by_op(runs, case):
    for (one, expected), (other, found) in itertools.combinations(runs.items(), 2):
        assert found.keys() == expected.keys()
        for name in found:
            if name.startswith(case):
                _assert_equal(found[name], expected[name], f"{name}: {other} beside {one}")


@pytest.mark.once
def test_what_is_compared_has_every_step_the_weights_the_statistics_and_the_metrics(runs, start):
    results = runs["jax", "compiled"]
    assert results["classify/losses"].shape == results["draw/d_loss"].shape == (parity_step.STEPS,)
    for case, values in start.items():
        for index, value in enumerate(values):
            [name] = [name for name in results if name.startswith(f"{case}/{index} ")]
            assert not np.allclose(results[name], value, atol=1e-3), f"{name} did not move"
    names = " ".join(results)
    for needed in ("accuracy", "mean loss", "certainty", "g_loss", "moving_mean", "moving_variance"):
        assert needed in names


@pytest.mark.once
def test_they_are_the_numbers_of_a_loop_in_native_torch(runs, start):
    """So that three backends which are wrong alike would be noticed."""
    expected = _classified_by_torch(start["classify"])
    for where, results in runs.items():
        for name, value in expected.items():
            _assert_equal(results[f"classify/{name}"], value, f"{name} on {where}")


def _drawn(variable, numbers):
    if "variance" in variable.name or "gamma" in variable.name:
        return np.ones(variable.shape, "float32")
    return numbers.normal(scale=0.3, size=variable.shape).astype("float32")


def _started(backend, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parity_step", folder / "start.npz", folder / f"{backend}.npz"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _assert_equal(found, expected, what):
    atol = ATOL_OF_LARGEST * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=atol, err_msg=what)


def _classified_by_torch(start):
    """The classifier of `parity_step`, every formula written out, in double precision."""
    import torch  # noqa: PLC0415  Only this one test wants it beside the backend at hand.

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
    weights = {
        "0 kernel": kernel,
        "1 gamma": gamma,
        "2 beta": beta,
        "3 moving_mean": mean,
        "4 moving_variance": variance,
        "5 kernel": dense,
        "6 bias": bias,
    }
    return {
        "losses": np.array(losses),
        "mean loss": np.mean(losses),
        "accuracy": correct / (step.STEPS * step.BATCH),
        **{name: tensor.detach().numpy() for name, tensor in weights.items()},
    }
