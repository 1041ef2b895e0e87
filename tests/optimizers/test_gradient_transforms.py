"""Gradient transforms, against NumPy, and what applies them."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.optimizers import (
    SAM,
    AdaptiveGradientClip,
    AddNoise,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Freeze,
    GradientTransforms,
    Multiply,
    UpdateEvery,
    global_norm,
)

RANDOM = np.random.default_rng(0)
KERNEL, BIAS = RANDOM.normal(size=(3, 2)).astype("float32"), RANDOM.normal(size=2).astype("float32")
G_KERNEL, G_BIAS = RANDOM.normal(size=(3, 2)).astype("float32"), RANDOM.normal(size=2).astype("float32")
NORM = np.sqrt((G_KERNEL**2).sum() + (G_BIAS**2).sum())


def variables():
    layer = layers.Dense(2, name="dense")
    layer.build((None, 3))
    layer.set_weights([KERNEL, BIAS])
    return layer.trainable_variables


def changed(transform):
    gradients = transform([ops.convert_to_tensor(G_KERNEL), ops.convert_to_tensor(G_BIAS)], variables())
    return [None if gradient is None else ops.convert_to_numpy(gradient) for gradient in gradients]


def shrunk(gradient, limit):
    return gradient * min(1, limit / np.linalg.norm(gradient))


def by_unit(gradient, weights, ratio=0.1, least=1e-3):
    limit = ratio * np.maximum(np.linalg.norm(weights, axis=0), least)
    return gradient * np.minimum(1, limit / np.linalg.norm(gradient, axis=0))


CASES = {
    "value": (ClipByValue(0.3), np.clip(G_KERNEL, -0.3, 0.3), np.clip(G_BIAS, -0.3, 0.3)),
    "norm": (ClipByNorm(0.5), shrunk(G_KERNEL, 0.5), shrunk(G_BIAS, 0.5)),
    "global norm": (ClipByGlobalNorm(0.5), G_KERNEL * 0.5 / NORM, G_BIAS * 0.5 / NORM),
    "large global norm": (ClipByGlobalNorm(100.0), G_KERNEL, G_BIAS),
    "adaptive": (AdaptiveGradientClip(0.1), by_unit(G_KERNEL, KERNEL), shrunk(G_BIAS, 0.1 * np.linalg.norm(BIAS))),
    "centralize": (Centralize(), G_KERNEL - G_KERNEL.mean(axis=0), G_BIAS),
    "multiply": (Multiply({"bias$": 2.0, "dense": 0.5}), G_KERNEL * 0.5, G_BIAS * 2),
    "freeze": (Freeze("kernel"), None, G_BIAS),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_is_its_formula(kind):
    transform, *expected = CASES[kind]
    for mine, theirs in zip(changed(transform), expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", CASES)
def test_none_stays_none(kind):
    assert CASES[kind][0]([None, None], variables()) == [None, None]


def test_the_global_norm_of_nothing_is_zero():
    assert float(ops.convert_to_numpy(global_norm([None]))) == 0


def test_noise_has_its_standard_deviation_and_is_new_each_time():
    transform, big = AddNoise(0.5, seed=3), keras.Variable(np.zeros((100, 100), "float32"))
    step = hl.function(lambda: transform([ops.zeros((100, 100))], [big])[0])
    first, second = (ops.convert_to_numpy(step()) for _ in range(2))
    np.testing.assert_allclose([first.std(), second.std()], 0.5, rtol=0.05)
    assert np.abs(first - second).max() > 0.1


def moved(optimizer):
    """How far a step of `sum(w * G)` moves the weights."""
    layer = variables()
    loss = lambda: ops.sum(layer[0] * G_KERNEL) + ops.sum(layer[1] * G_BIAS)  # noqa: E731
    hl.function(lambda: hl.minimize(loss, layer, optimizer))()
    return [ops.convert_to_numpy(v.value) - start for v, start in zip(layer, (KERNEL, BIAS), strict=True)]


def test_they_are_applied_in_turn_and_a_users_own_among_them(eagerly):
    own = lambda gradients, variables: [2 * gradient for gradient in gradients]  # noqa: E731
    kernel, bias = moved(GradientTransforms(keras.optimizers.SGD(1.0), [ClipByGlobalNorm(0.5), own]))
    np.testing.assert_allclose(kernel, -G_KERNEL / NORM, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias, -G_BIAS / NORM, rtol=1e-4, atol=1e-6)


def test_around_optimizers_by_name_a_norm_is_global():
    class Two(hl.Model):
        def __init__(self):
            super().__init__()
            self.kernel, self.bias = keras.Variable(KERNEL), keras.Variable(BIAS)

        def train_step(self, data):
            loss = lambda: ops.sum(self.kernel * G_KERNEL) + ops.sum(self.bias * G_BIAS)  # noqa: E731
            return {"loss": self.minimize(loss)}

    model = Two()
    sgd = {"kernel": keras.optimizers.SGD(1.0), "bias": keras.optimizers.SGD(2.0)}
    model.compile(GradientTransforms(sgd, [ClipByGlobalNorm(0.5)]))
    model.fit(np.ones((1, 1), "float32"), verbose=0)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.kernel) - KERNEL, -G_KERNEL * 0.5 / NORM, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(ops.convert_to_numpy(model.bias) - BIAS, -G_BIAS / NORM, rtol=1e-4, atol=1e-6)


def test_what_a_transform_returns_is_checked():
    with pytest.raises(ValueError, match="was given 2 gradients and returned 1"):
        moved(GradientTransforms("sgd", [lambda gradients, variables: gradients[:1]]))
    with pytest.raises(ValueError, match=r"returned a gradient of shape \(\) for 'dense/kernel', which has shape"):
        moved(GradientTransforms("sgd", [lambda gradients, variables: [ops.sum(g) for g in gradients]]))
    with pytest.raises(TypeError, match="A transform is a function"):
        GradientTransforms("sgd", ["clip"])


@pytest.mark.parametrize("cls", [ClipByValue, ClipByNorm, ClipByGlobalNorm, AdaptiveGradientClip, AddNoise])
@pytest.mark.parametrize("limit", [0.0, -1.0, True, "1", float("nan")])
def test_a_limit_that_is_not_positive_is_refused(cls, limit):
    with pytest.raises(ValueError, match=f"{cls.__name__} takes a positive .*received"):
        cls(limit)


def test_they_are_saved_with_the_model(tmp_path):
    model = hl.Model([keras.Input((3,)), layers.Dense(2)])
    transforms = [ClipByGlobalNorm(0.5), Multiply({"bias": 0.1}), AddNoise(0.1, seed=2)]
    model.compile(GradientTransforms("adam", transforms), "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert loaded.transforms[:2] == transforms[:2]
    assert loaded.transforms[2].get_config() == {"stddev": 0.1, "seed": 2}
    assert int(loaded.iterations.value) == 1


def test_an_update_every_third_step(eagerly):
    weight, optimizer = keras.Variable(0.0), UpdateEvery(keras.optimizers.SGD(1.0), 3)
    step = hl.function(lambda value: hl.minimize(lambda: weight * value, weight, optimizer))
    seen = []
    for value in range(1, 8):
        step(np.float32(value))
        seen.append(float(ops.convert_to_numpy(weight.value)))
    assert seen == [0, 0, -3, -3, -3, -9, -9]
    assert int(optimizer.iterations.value) == 2


def test_sharpness_aware_takes_the_gradient_uphill_and_side_effects_once(eagerly):
    weight, calls = keras.Variable([1.0, 2.0]), keras.Variable(0.0, trainable=False)
    optimizer = SAM(keras.optimizers.SGD(0.1), radius=0.05)

    def loss():
        calls.assign(calls + 1)
        return ops.sum(weight * weight * weight)

    step, expected = hl.function(lambda: hl.minimize(loss, weight, optimizer)), np.array([1.0, 2.0])
    for _ in range(3):
        step()
        uphill = expected + 0.05 * 3 * expected**2 / np.linalg.norm(3 * expected**2)
        expected = expected - 0.1 * 3 * uphill**2
    np.testing.assert_allclose(ops.convert_to_numpy(weight.value), expected, rtol=1e-5)
    assert float(ops.convert_to_numpy(calls.value)) == 3
