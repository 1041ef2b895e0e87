"""`LossScaleOptimizer`, against plain updates."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.errors import OptimizerError
from handloom.optimizers import LossScaleOptimizer
from tests.models import compiled, fit, functional
from tests.numbers import close, each_same, ones, values_of

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
# Scaled gradients; those that are not finite are skipped.
GRADIENTS = [[8.0, 16.0], [np.inf, 1.0], [8.0, 4.0], [8.0, 4.0], [1.0, np.nan], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0]]
SCALES = [8.0, 4.0, 4.0, 8.0, 4.0, 4.0, 8.0, 8.0]  # After each: halved by the second and fifth, doubled after two good.


def test_loss_scale_optimizer_takes_the_name_of_an_optimizer_and_refuses_a_dict():
    assert isinstance(LossScaleOptimizer("adam").inner_optimizer, Adam)
    with pytest.raises(ValueError, match=r"around one optimizer; received \{'\*': 'sgd'\}.*HL336"):
        LossScaleOptimizer({"*": "sgd"})


def tensor(values):
    return ops.convert_to_tensor(np.array(values, "float32"))


def scaled(inner, **options):
    """An optimizer, its variable, and a compiled step that scales the loss."""
    variable, optimizer = keras.Variable([1.0, 2.0]), LossScaleOptimizer(inner, **options)
    optimizer.build([variable])

    @hl.function
    def step(gradient):
        optimizer.scale_loss(ops.ones(()))
        optimizer.apply([gradient], [variable])

    return optimizer, variable, step


def test_loss_scale_optimizer_multiplies_the_loss_by_the_scale_at_first_that_of_keras():
    close(LossScaleOptimizer(SGD(), initial_scale=32.0).scale_loss(tensor(1.5)), 48)
    close(LossScaleOptimizer(SGD()).scale_loss(tensor(1.0)), 2**15)


def test_loss_scale_optimizer_divides_gradients_by_the_scale_before_it_clips_them(eagerly):
    _, variable, step = scaled(SGD(0.1, clipnorm=1.0), initial_scale=8.0)
    step(tensor([24.0, 32.0]))
    close(variable, [1 - 0.06, 2 - 0.08])


@pytest.mark.parametrize("forget", [False, True])
def test_loss_scale_optimizer_is_exact_in_a_loop_by_hand_that_scales_the_loss_or_forgets_to(forget, eagerly):
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(SGD(0.1))

    @hl.function
    def step():
        gradient = hl.grad(lambda: w**2 if forget else optimizer.scale_loss(w**2), wrt=w)()
        optimizer.apply([gradient], [w])

    step()
    step()
    close(w, 3 * 0.8**2)


def test_loss_scale_optimizer_divides_only_the_gradients_of_a_step_that_scaled_the_loss():
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(SGD(0.1), initial_scale=8.0)
    optimizer.scale_loss(tensor(1.0))
    optimizer.apply([tensor(8.0)], [w])
    optimizer.apply([tensor(1.0)], [w])
    close(w, 3 - 0.2)


def test_loss_scale_optimizer_updates_from_finite_gradients_alone(eagerly):
    optimizer, variable, step = scaled(Adam(0.1), initial_scale=8.0, dynamic_growth_steps=2)
    twin, plain = keras.Variable([1.0, 2.0]), Adam(0.1)
    for gradient, before, after in zip(GRADIENTS, [8.0, *SCALES], SCALES, strict=False):
        held = values_of(optimizer.inner_optimizer)
        step(tensor(gradient))
        if np.all(np.isfinite(gradient)):
            plain.apply([tensor(gradient) / before], [twin])
        else:
            each_same(values_of(optimizer.inner_optimizer), held)
        close(variable, twin)
        close(optimizer.dynamic_scale, after)
    close([optimizer.iterations, plain.iterations, optimizer.skipped], [6, 6, 2])


def test_loss_scale_optimizer_skips_the_update_of_all_for_one_gradient_that_is_not_finite():
    a, b, optimizer = keras.Variable(1.0), keras.Variable(2.0), LossScaleOptimizer(SGD(0.1))
    optimizer.apply([tensor(np.nan), tensor(1.0)], [a, b])
    close([a, b], [1, 2])


def test_loss_scale_optimizer_leaves_a_variable_that_is_not_reached():
    a, b, optimizer = keras.Variable(1.0, name="a"), keras.Variable(2.0, name="b"), LossScaleOptimizer(SGD(0.1))
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['b'\]"):
        optimizer.apply([tensor(1.0), None], [a, b])
    close([a, b], [0.9, 2])


def test_loss_scale_optimizer_needs_variables_until_it_is_built():
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(SGD(0.1))
    with pytest.raises(OptimizerError, match=r"not built.*optimizer\.build\(variables\).*HL310"):
        optimizer.apply([tensor(1.0)])
    optimizer.build([w])
    optimizer.apply([tensor(1.0)])
    close(w, 2.9)


def test_loss_scale_optimizer_sets_the_learning_rate_of_its_inner_optimizer():
    optimizer = LossScaleOptimizer(SGD(0.1))
    optimizer.learning_rate = 0.5
    close(optimizer.inner_optimizer.learning_rate, 0.5)


def test_loss_scale_optimizer_of_a_model_in_mixed_float16_is_saved_with_its_scale(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(functional(), SGD(0.1, momentum=0.9))
    assert isinstance(model.optimizer.inner_optimizer, SGD)
    fit(model, ones(4, 3), ones(4, 1))
    model.optimizer.dynamic_scale.assign(64.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(model.optimizer) is type(loaded.optimizer) is LossScaleOptimizer
    close(loaded.optimizer.dynamic_scale, 64)
    for either in (model, loaded):
        fit(either, ones(4, 3), ones(4, 1))
    each_same(loaded.get_weights(), model.get_weights())


def test_loss_scale_optimizer_is_loaded_from_its_config():
    optimizer = LossScaleOptimizer(SGD(0.1), initial_scale=8.0, dynamic_growth_steps=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is LossScaleOptimizer
    assert again.get_config() == optimizer.get_config()
