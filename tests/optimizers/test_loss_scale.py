"""Loss scaling for float16, against plain updates and Keras's own."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import OptimizerError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
LossScaleOptimizer = hl.optimizers.LossScaleOptimizer

# Scaled gradients; what is not finite takes no part in the update.
GRADIENTS = [[8.0, 16.0], [np.inf, 1.0], [8.0, 4.0], [8.0, 4.0], [1.0, np.nan], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0]]
SCALES = [8.0, 4.0, 4.0, 8.0, 4.0, 4.0, 8.0, 8.0]  # After each: halved by the second and fifth, doubled after two good.


def tensor(values):
    return ops.convert_to_tensor(np.array(values, "float32"))


def scaled(inner, **options):
    """An optimizer, the variable it is built for, and a compiled step that scales the loss as it should."""
    variable, optimizer = keras.Variable([1.0, 2.0]), LossScaleOptimizer(inner, **options)
    optimizer.build([variable])

    @hl.function
    def step(gradient):
        optimizer.scale_loss(ops.ones(()))
        optimizer.apply([gradient], [variable])

    return optimizer, variable, step


def test_the_loss_is_multiplied_by_the_scale():
    close(LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=32.0).scale_loss(tensor(1.5)), 48)


def test_the_first_scale_is_that_of_keras():
    close(LossScaleOptimizer(keras.optimizers.SGD()).scale_loss(tensor(1.0)), 2**15)


def test_gradients_of_a_scaled_loss_are_divided_by_the_scale(eagerly):
    _, variable, step = scaled(keras.optimizers.SGD(0.1), initial_scale=8.0)
    step(tensor([8.0, 16.0]))
    close(variable.numpy(), [1 - 0.1, 2 - 0.2])


def test_a_loop_by_hand_is_exact(eagerly):
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(keras.optimizers.SGD(0.1))

    @hl.function
    def step():
        gradient = hl.grad(lambda: optimizer.scale_loss(w**2), wrt=w)()
        optimizer.apply([gradient], [w])

    step()
    step()
    close(w.numpy(), 3 * 0.8**2)


def test_forgetting_to_scale_the_loss_does_no_harm(eagerly):
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(keras.optimizers.SGD(0.1))

    @hl.function
    def step():
        optimizer.apply([hl.grad(lambda: w**2, wrt=w)()], [w])

    step()
    step()
    close(w.numpy(), 3 * 0.8**2)


@pytest.mark.backend("torch", "tensorflow")  # On JAX it cannot be used in this way at all.
def test_forgetting_to_scale_with_keras_s_own_learns_nothing():
    """What the one above is there for."""
    w, optimizer = keras.Variable(3.0), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.apply([tensor(6.0)], [w])
    assert 3 - float(w.numpy()) < 1e-4


def test_one_step_that_scales_does_not_make_the_next_one_do_so():
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    optimizer.scale_loss(tensor(1.0))
    optimizer.apply([tensor(8.0)], [w])
    optimizer.apply([tensor(1.0)], [w])
    close(w.numpy(), 3 - 0.2)


def test_a_run_with_overflows_is_that_of_the_finite_gradients_alone(eagerly):
    optimizer, variable, step = scaled(keras.optimizers.Adam(0.1), initial_scale=8.0, dynamic_growth_steps=2)
    twin, plain = keras.Variable([1.0, 2.0]), keras.optimizers.Adam(0.1)
    for gradient, before, after in zip(GRADIENTS, [8.0, *SCALES], SCALES, strict=False):
        step(tensor(gradient))
        if np.all(np.isfinite(gradient)):
            plain.apply([tensor(gradient) / before], [twin])
        close(variable.numpy(), twin.numpy())
        close(optimizer.dynamic_scale.numpy(), after)
    assert int(optimizer.iterations.numpy()) == int(plain.iterations.numpy()) == 6


@pytest.mark.backend("torch", "tensorflow")
def test_a_run_is_that_of_keras_s_own_used_right(eagerly):
    options = {"initial_scale": 8.0, "dynamic_growth_steps": 2}
    ours, variable, step = scaled(keras.optimizers.Adam(0.1), **options)
    twin, theirs = (
        keras.Variable([1.0, 2.0]),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), **options),
    )
    for gradient in GRADIENTS:
        step(tensor(gradient))
        theirs.apply([tensor(gradient)], [twin])
        close(variable.numpy(), twin.numpy())
        close(ours.dynamic_scale.numpy(), theirs.dynamic_scale.numpy())
        assert int(ours.step_counter.numpy()) == int(theirs.step_counter.numpy())


@pytest.mark.backend("jax")
def test_a_run_is_that_of_keras_s_own_used_statelessly(eagerly):
    options = {"initial_scale": 8.0, "dynamic_growth_steps": 2}
    ours, variable, step = scaled(keras.optimizers.Adam(0.1), **options)
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), **options)
    theirs.build([variable])
    weights, state = [tensor([1.0, 2.0])], [own.value for own in theirs.variables]
    for gradient in GRADIENTS:
        step(tensor(gradient))
        weights, state = theirs.stateless_apply(state, [tensor(gradient)], weights)
        close(variable.numpy(), weights[0])
        common = [own for own in ours.variables if own is not ours.skipped]
        for own, expected in zip(common, state, strict=True):
            close(own.numpy(), expected)


def test_a_skipped_update_leaves_slots_and_iterations(eagerly):
    optimizer, variable, step = scaled(keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=8.0)
    step(tensor([8.0, 16.0]))
    before = [own.numpy() for own in [variable, *optimizer.inner_optimizer.variables]]
    step(tensor([np.inf, 1.0]))
    for now, then in zip([variable, *optimizer.inner_optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(now.numpy(), then)


def test_one_gradient_that_is_not_finite_skips_the_update_of_all():
    a, b, optimizer = keras.Variable(1.0), keras.Variable(2.0), LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.apply([tensor(np.nan), tensor(1.0)], [a, b])
    close([a.numpy(), b.numpy()], [1, 2])


def test_a_variable_that_is_not_reached_is_left_alone():
    a, b = keras.Variable(1.0, name="a"), keras.Variable(2.0, name="b")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['b'\]"):
        optimizer.apply([tensor(1.0), None], [a, b])
    close([a.numpy(), b.numpy()], [0.9, 2])


def test_gradients_are_clipped_unscaled(eagerly):
    _, variable, step = scaled(keras.optimizers.SGD(0.1, clipnorm=1.0), initial_scale=8.0)
    step(tensor([24.0, 32.0]))
    close(variable.numpy(), [1 - 0.06, 2 - 0.08])


def test_once_built_it_needs_no_variables():
    w, optimizer = keras.Variable(3.0), LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([w])
    optimizer.apply([tensor(1.0)])
    close(w.numpy(), 2.9)


def test_without_variables_it_must_be_built():
    with pytest.raises(OptimizerError, match=r"not built.*optimizer\.build\(variables\)"):
        LossScaleOptimizer(keras.optimizers.SGD()).apply([tensor(1.0)])


def test_a_learning_rate_is_that_of_the_inner_optimizer():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.learning_rate = 0.5
    close(optimizer.inner_optimizer.learning_rate.numpy(), 0.5)


def half_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model = hl.Model([keras.Input((2,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss="mse")
    return model


def test_a_model_in_mixed_float16_is_compiled_with_it():
    model = half_precision()
    assert type(model.optimizer) is LossScaleOptimizer
    assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.SGD)


def test_a_loss_scale_is_saved_with_its_model_and_goes_on(tmp_path):
    model = half_precision()
    x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
    model.fit(x, y, verbose=0)
    model.optimizer.dynamic_scale.assign(64.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is LossScaleOptimizer
    close(loaded.optimizer.dynamic_scale.numpy(), 64)
    model.fit(x, y, verbose=0)
    loaded.fit(x, y, verbose=0)
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_config_makes_the_same_optimizer():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0, dynamic_growth_steps=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is LossScaleOptimizer
    assert again.get_config() == optimizer.get_config()
