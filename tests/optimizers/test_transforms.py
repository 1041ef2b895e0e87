"""Gradient transforms, against NumPy; `GradientTransforms`, which applies them."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.optimizers import (
    AdaptiveGradientClip,
    AddNoise,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Freeze,
    GradientTransforms,
    Scale,
    global_norm,
)
from tests.models import built, compiled, fit, functional
from tests.numbers import close, each_close, normal, numpy, ones

KERNEL, BIAS, G_KERNEL, G_BIAS = normal(3, 2), normal(2, seed=1), normal(3, 2, seed=2), normal(2, seed=3)
NORM = np.sqrt((G_KERNEL**2).sum() + (G_BIAS**2).sum())


def variables():
    layer = built(layers.Dense(2, name="dense"))
    layer.set_weights([KERNEL, BIAS])
    return layer.trainable_variables


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
    "scale": (Scale({"bias$": 2.0, "dense": 0.5}), G_KERNEL * 0.5, G_BIAS * 2),
    "freeze": (Freeze("kernel"), None, G_BIAS),
}


@pytest.mark.parametrize("kind", CASES)
def test_gradient_transform_follows_its_formula_and_leaves_none(kind):
    transform, *expected = CASES[kind]
    found = transform([ops.convert_to_tensor(G_KERNEL), ops.convert_to_tensor(G_BIAS)], variables())
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or close(one, other) is None
    assert transform([None, None], variables()) == [None, None]


def test_global_norm_of_nothing_is_zero():
    assert float(numpy(global_norm([None]))) == 0


def test_add_noise_has_its_standard_deviation_and_differs_each_time():
    transform, large = AddNoise(0.5, seed=3), keras.Variable(np.zeros((100, 100), "float32"))
    step = hl.function(lambda: transform([ops.zeros((100, 100))], [large])[0])
    first, second = numpy(step()), numpy(step())
    close([first.std(), second.std()], [0.5, 0.5], rtol=0.05)
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("cls", [ClipByValue, ClipByNorm, ClipByGlobalNorm, AdaptiveGradientClip, AddNoise])
@pytest.mark.parametrize("limit", [0.0, -1.0, True, "1", float("nan")])
def test_gradient_transform_refuses_a_limit_that_is_not_positive(cls, limit):
    with pytest.raises(ValueError, match=rf"{cls.__name__}\(.*takes a positive number; received"):
        cls(limit)


def moved(optimizer):
    """How far a step of `sum(w * G)` moves the weights."""
    kernel, bias = trained = variables()
    loss = lambda: ops.sum(kernel * G_KERNEL) + ops.sum(bias * G_BIAS)  # noqa: E731
    hl.function(lambda: hl.minimize(loss, trained, optimizer))()
    return numpy(kernel) - KERNEL, numpy(bias) - BIAS


def test_gradient_transforms_are_applied_in_order_also_a_users_function(eagerly):
    own = lambda gradients, variables: [2 * gradient for gradient in gradients]  # noqa: E731
    found = moved(GradientTransforms(keras.optimizers.SGD(1.0), [ClipByGlobalNorm(0.5), own]))
    each_close(found, [-G_KERNEL / NORM, -G_BIAS / NORM], rtol=1e-4)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda gradients, variables: gradients[:1], "received 2 gradients and returned 1.*HL308"),
        (lambda gradients, variables: [ops.sum(g) for g in gradients], r"shape \(\) for 'dense/kernel', of.*HL309"),
        ("clip", "takes gradients and variables; received 'clip'.*HL307"),
    ],
)
def test_gradient_transforms_check_functions_and_their_results(transform, words):
    with pytest.raises(ValueError, match=words):
        moved(GradientTransforms("sgd", [transform]))


@pytest.mark.parametrize(("kind", "patterns"), [(Freeze, "("), (Scale, {"(": 0.5}), (Scale, 0.5), (Scale, None)])
def test_scale_and_freeze_refuse_what_is_no_pattern(kind, patterns):
    with pytest.raises(ValueError, match=rf"{kind.__name__} takes regular expressions .*; received .*Scale\(.*HL335"):
        kind(patterns)


def test_gradient_transforms_take_a_single_transform():
    one, several = (GradientTransforms("sgd", form) for form in (ClipByNorm(0.5), [ClipByNorm(0.5)]))
    each_close(moved(one), moved(several))


def test_gradient_transforms_are_saved_with_the_model(tmp_path):
    transforms = [ClipByGlobalNorm(0.5), Scale({"bias": 0.1}), AddNoise(0.1, seed=2)]
    model = compiled(functional(), GradientTransforms("adam", transforms))
    fit(model, ones(4, 3), ones(4, 1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert loaded.transforms[:2] == transforms[:2]
    assert loaded.transforms[2].get_config() == {"stddev": 0.1, "seed": 2}
    assert int(loaded.iterations.value) == 1


class Averaged(GradientTransforms):
    """Averages the gradients at the weights and at half of them."""

    def take_gradients(self, loss):
        result, first = loss.gradients()
        [variable] = loss.variables
        variable.assign(variable / 2)
        _, second = loss.gradients()
        variable.assign(variable * 2)
        return result, [(first[0] + second[0]) / 2]


def test_gradient_transforms_subclass_takes_the_gradients_itself(eagerly):
    weight = keras.Variable(4.0)
    doubled = lambda gradients, variables: [2 * gradient for gradient in gradients]  # noqa: E731
    optimizer = Averaged(keras.optimizers.SGD(0.1), [doubled])
    returned = hl.function(lambda: hl.minimize(lambda: weight**2, weight, optimizer))()
    close([returned, weight], [16, 4 - 0.1 * 2 * (8 + 4) / 2])
