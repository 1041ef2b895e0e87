"""One update by `hl.minimize`, against NumPy and against Keras's optimizers given the gradients by hand."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops, regularizers

import handloom as hl
from handloom.errors import GradientError, HandloomWarning, OptimizerError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

X = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]], "float32")
Y = np.array([[1.0], [2.0], [-1.0]], "float32")
W = np.array([[0.5], [-0.25]], "float32")
B = np.array([0.1], "float32")


def line(**options):
    """A linear model from known weights."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, **options)])
    model.set_weights([W, B])
    return model


def squared_error(model, x, y):
    return ops.mean((model(x) - y) ** 2)


def by_hand(w, b):
    """The squared error of the line and its two gradients, in NumPy."""
    residual = X @ w + b - Y
    return np.mean(residual**2), 2 / len(X) * X.T @ residual, 2 * np.mean(residual, axis=0)


def training(model, optimizer, wrt=None, loss_fn=squared_error):
    """A compiled function that updates the model once."""

    @hl.function
    def step(x, y):
        return hl.minimize(lambda: loss_fn(model, x, y), model if wrt is None else wrt, optimizer)

    return step


def value_of(variable):
    return np.array(ops.convert_to_numpy(variable))


# ---------------------------------------------------------------------- one optimizer


def test_one_update_is_the_one_by_hand(eagerly):
    model = line()
    returned = training(model, keras.optimizers.SGD(0.1))(X, Y)
    loss, by_w, by_b = by_hand(W, B)
    close(returned, loss)
    close(model.get_weights()[0], W - 0.1 * by_w)
    close(model.get_weights()[1], B - 0.1 * by_b)


def test_an_update_outside_of_a_compiled_function_is_the_same():
    model = line()
    x, y = ops.convert_to_tensor(X), ops.convert_to_tensor(Y)
    returned = hl.minimize(lambda: squared_error(model, x, y), model, keras.optimizers.SGD(0.1))
    loss, by_w, _ = by_hand(W, B)
    close(returned, loss)
    close(model.get_weights()[0], W - 0.1 * by_w)


def test_momentum_follows_its_recurrence(eagerly):
    model = line()
    step = training(model, keras.optimizers.SGD(0.05, momentum=0.9))
    w, b, moved_w, moved_b = W, B, np.zeros_like(W), np.zeros_like(B)
    for _ in range(5):
        loss, by_w, by_b = by_hand(w, b)
        moved_w, moved_b = 0.9 * moved_w - 0.05 * by_w, 0.9 * moved_b - 0.05 * by_b
        w, b = w + moved_w, b + moved_b
        close(step(X, Y), loss)
    close(model.get_weights()[0], w)
    close(model.get_weights()[1], b)


def test_adam_follows_its_recurrence(eagerly):
    model = line()
    step = training(model, keras.optimizers.Adam(0.05))
    w, b, mean, square = W, B, [0.0, 0.0], [0.0, 0.0]
    for count in range(1, 6):
        loss, *gradients = by_hand(w, b)
        mean = [0.9 * m + 0.1 * g for m, g in zip(mean, gradients, strict=True)]
        square = [0.999 * s + 0.001 * g**2 for s, g in zip(square, gradients, strict=True)]
        rate = 0.05 * np.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        w, b = (v - rate * m / (np.sqrt(s) + 1e-7) for v, m, s in zip([w, b], mean, square, strict=True))
        close(step(X, Y), loss, rtol=1e-4)
    close(model.get_weights()[0], w, rtol=1e-4, atol=1e-5)
    close(model.get_weights()[1], b, rtol=1e-4, atol=1e-5)


OPTIMIZERS = {
    "weight decay": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "clipped by global norm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.5),
    "averaged weights": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.05),
}


@pytest.mark.filterwarnings("ignore:.*changes a tensor in place:handloom.errors.FallbackWarning")  # See below.
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_option_of_keras_works_as_when_it_is_given_the_gradients(make):
    model, twin = line(), line()
    step, optimizer = training(model, make()), make()
    for _ in range(3):
        step(X, Y)
        _, *gradients = by_hand(*twin.get_weights())
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], twin.trainable_variables)
    for own, expected in zip(model.get_weights(), twin.get_weights(), strict=True):
        close(own, expected, rtol=1e-4)


def test_accumulation_of_keras_s_own_which_updates_in_a_branch_is_compiled():
    """Keras's optimizers for torch change variables in place there."""
    model = line()
    step = training(model, keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    step(X, Y)
    np.testing.assert_array_equal(model.get_weights()[0], W)
    step(X, Y)
    other = line()
    training(other, keras.optimizers.SGD(0.1))(X, Y)
    close(model.get_weights()[0], other.get_weights()[0])


def test_clipping_by_norm_bounds_each_move(eagerly):
    model = line()
    training(model, keras.optimizers.SGD(0.1, clipnorm=1.0))(100 * X, Y)
    close(np.linalg.norm(model.get_weights()[0] - W), 0.1)


def test_a_new_learning_rate_counts_from_the_next_update_without_a_new_trace():
    model, optimizer = line(), keras.optimizers.SGD(0.1)
    step = training(model, optimizer)
    step(X, Y)
    before = model.get_weights()
    optimizer.learning_rate = 0.01
    step(X, Y)
    close(model.get_weights()[0], before[0] - 0.01 * by_hand(*before)[1])
    assert len(step.traces) == 1


def test_a_constraint_holds_after_every_update(eagerly):
    model = line(kernel_constraint=keras.constraints.UnitNorm(axis=None))
    step = training(model, keras.optimizers.SGD(0.5))
    for _ in range(3):
        step(X, Y)
        close(np.linalg.norm(model.get_weights()[0]), 1, rtol=1e-4)


def test_a_layer_may_be_built_by_its_first_update(eagerly):
    dense = layers.Dense(1, kernel_initializer="ones")
    model = training(dense, keras.optimizers.Adam(0.05))
    known = line()
    known.set_weights([np.ones((2, 1)), np.zeros(1)])
    twin = training(known, keras.optimizers.Adam(0.05))
    for _ in range(2):
        close(model(X, Y), twin(X, Y))
    close(dense.kernel, known.get_weights()[0])


# ---------------------------------------------------------------------- what is trained


def test_a_single_variable():
    w = keras.Variable(3.0)
    close(hl.minimize(lambda: w**2, w, keras.optimizers.SGD(0.1)), 9)
    close(w.numpy(), 3 - 0.1 * 6)


@pytest.mark.parametrize(
    "gathered",
    [list, tuple, lambda pair: {"a": pair[0], "b": pair[1]}, lambda pair: {"deep": [pair[0], (pair[1],)]}],
    ids=["list", "tuple", "dict", "nested"],
)
def test_variables_in_a_structure(gathered):
    a, b = keras.Variable(2.0), keras.Variable(3.0)
    hl.minimize(lambda: a**2 * b, gathered([a, b]), keras.optimizers.SGD(0.1))
    close([a.numpy(), b.numpy()], [2 - 0.1 * 12, 3 - 0.1 * 4])


def test_a_layer_and_a_variable_together():
    dense, scale = layers.Dense(1, use_bias=False, kernel_initializer="ones"), keras.Variable(3.0)
    dense.build((None, 2))
    hl.minimize(lambda: ops.sum(dense(X)) * scale, {"layer": dense, "scale": scale}, keras.optimizers.SGD(0.1))
    total = np.sum(X)
    close(dense.kernel, 1 - 0.1 * 3 * np.sum(X, axis=0)[:, None])
    close(scale.numpy(), 3 - 0.1 * total)


def test_only_the_chosen_part_moves():
    model = line()
    training(model, keras.optimizers.SGD(0.1), wrt=model.layers[-1].bias)(X, Y)
    np.testing.assert_array_equal(model.get_weights()[0], W)
    close(model.get_weights()[1], B - 0.1 * by_hand(W, B)[2])


def test_frozen_layers_stay():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Dense(1)])
    frozen = model.layers[0]
    frozen.trainable = False
    before = frozen.get_weights()
    training(model, keras.optimizers.SGD(0.1))(X, Y)
    for now, then in zip(frozen.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_two_optimizers_on_two_nets_each_move_only_their_own(eagerly):
    """A GAN in small: the one's loss runs through the other."""
    generator, discriminator = layers.Dense(2, name="generator"), layers.Dense(1, name="discriminator")
    generator.build((None, 2))
    discriminator.build((None, 2))
    g_optimizer, d_optimizer = keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1)

    @hl.function
    def d_step(x):
        return hl.minimize(lambda: ops.mean(discriminator(generator(x))), discriminator, d_optimizer)

    @hl.function
    def g_step(x):
        return hl.minimize(lambda: -ops.mean(discriminator(generator(x))), generator, g_optimizer)

    g_weights, fake = generator.get_weights(), value_of(generator(X))
    kernel, bias = discriminator.get_weights()
    d_step(X)
    for now, then in zip(generator.get_weights(), g_weights, strict=True):
        np.testing.assert_array_equal(now, then)
    close(discriminator.kernel, kernel - 0.1 * np.mean(fake, axis=0)[:, None])
    close(discriminator.bias, bias - 0.1)
    d_weights = discriminator.get_weights()
    g_step(X)
    for now, then in zip(discriminator.get_weights(), d_weights, strict=True):
        np.testing.assert_array_equal(now, then)
    assert all(np.all(now != then) for now, then in zip(generator.get_weights(), g_weights, strict=True))
    assert (int(g_optimizer.iterations.value), int(d_optimizer.iterations.value)) == (1, 1)


def test_two_updates_in_one_step_see_each_other(eagerly):
    w, optimizer = keras.Variable(3.0), keras.optimizers.SGD(0.1)

    @hl.function
    def step():
        first = hl.minimize(lambda: w**2, w, optimizer)
        second = hl.minimize(lambda: w**2, w, optimizer)
        return first, second

    first, second = step()
    close([first, second, w.numpy()], [9, 2.4**2, 0.8 * 2.4])


def test_one_optimizer_built_for_both_parts_trains_either():
    a, b = keras.Variable(2.0), keras.Variable(3.0)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build([a, b])
    hl.minimize(lambda: a * b, a, optimizer)
    close([a.numpy(), b.numpy()], [2 - 0.3, 3])
    hl.minimize(lambda: a * b, b, optimizer)
    close([a.numpy(), b.numpy()], [1.7, 3 - 0.17])


def test_a_penalty_on_the_slope_falls_as_it_is_trained():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(8, "tanh"), layers.Dense(1, use_bias=False)])
    optimizer = keras.optimizers.Adam(0.02)

    def penalty(x):
        slopes = hl.grad(lambda x: ops.sum(model(x)))(x)
        return ops.mean(ops.sum(slopes**2, axis=-1))

    step = hl.function(lambda x: hl.minimize(lambda: penalty(x), model, optimizer))
    losses = [float(step(X)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------- aux


def test_aux_comes_back_beside_the_loss(eagerly):
    model, optimizer = line(), keras.optimizers.SGD(0.1)

    @hl.function
    def step(x, y):
        def loss_fn():
            y_pred = model(x)
            return ops.mean((y_pred - y) ** 2), {"y_pred": y_pred}

        return hl.minimize(loss_fn, model, optimizer, has_aux=True)

    loss, aux = step(X, Y)
    close(loss, by_hand(W, B)[0])
    close(aux["y_pred"], X @ W + B)


def test_aux_may_hold_anything():
    w = keras.Variable(3.0)
    _, aux = hl.minimize(lambda: (w**2, ("text", None, 5)), w, keras.optimizers.SGD(0.1), has_aux=True)
    assert aux == ("text", None, 5)


def test_the_pair_that_aux_needs_is_missing():
    w = keras.Variable(3.0)
    with pytest.raises(GradientError, match=r"has_aux=True the loss function must return a pair \(loss, aux\)"):
        hl.minimize(lambda: w**2, w, keras.optimizers.SGD(0.1), has_aux=True)


# ---------------------------------------------------------------------- regularizers and added losses


def without_losses(model, x, y):
    return squared_error(model, x, y)


def with_losses(model, x, y):
    return squared_error(model, x, y) + sum(model.losses)


def with_losses_of_the_layer(model, x, y):
    error = squared_error(model, x, y)
    return error + sum(model.layers[-1].losses)


each_way = pytest.mark.parametrize(
    "loss_fn", [without_losses, with_losses, with_losses_of_the_layer], ids=lambda fn: fn.__name__
)


@each_way
def test_a_regularizer_counts_once_however_the_loss_is_written(loss_fn, eagerly):
    model = line(kernel_regularizer=regularizers.L2(0.3))
    returned = training(model, keras.optimizers.SGD(0.1), loss_fn=loss_fn)(X, Y)
    loss, by_w, by_b = by_hand(W, B)
    close(returned, loss + 0.3 * np.sum(W**2))
    close(model.get_weights()[0], W - 0.1 * (by_w + 0.6 * W))
    close(model.get_weights()[1], B - 0.1 * by_b)


@each_way
def test_an_activity_regularizer_counts_once_however_the_loss_is_written(loss_fn, eagerly):
    model = line(activity_regularizer=regularizers.L2(0.3))
    returned = training(model, keras.optimizers.SGD(0.1), loss_fn=loss_fn)(X, Y)
    output = X @ W + B
    loss, by_w, by_b = by_hand(W, B)
    close(returned, loss + 0.3 * np.sum(output**2) / len(X))  # Keras takes the mean over the batch.
    close(model.get_weights()[0], W - 0.1 * (by_w + 0.6 * X.T @ output / len(X)))
    close(model.get_weights()[1], B - 0.1 * (by_b + 0.6 * np.mean(output, axis=0)))


class Reconstructing(keras.Model):
    """A model that adds a loss itself, and has no variables but those of its layer."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        y = self.dense(x)
        self.add_loss(0.05 * ops.mean(y**2))
        return y


def reconstructing():
    model = Reconstructing()
    model(X)
    model.set_weights([W, B])
    return model


@pytest.mark.parametrize("loss_fn", [without_losses, with_losses], ids=lambda fn: fn.__name__)
def test_an_added_loss_counts_once_however_the_loss_is_written(loss_fn, eagerly):
    model = reconstructing()
    returned = training(model, keras.optimizers.SGD(0.1), loss_fn=loss_fn)(X, Y)
    output = X @ W + B
    loss, by_w, _ = by_hand(W, B)
    close(returned, loss + 0.05 * np.mean(output**2))
    close(model.get_weights()[0], W - 0.1 * (by_w + 0.1 * X.T @ output / len(X)))


def test_losses_of_an_earlier_call_are_not_counted(eagerly):
    model = reconstructing()
    model(100 * X)
    returned = training(model, keras.optimizers.SGD(0.1))(X, Y)
    close(returned, by_hand(W, B)[0] + 0.05 * np.mean((X @ W + B) ** 2))


def test_a_layer_called_twice_adds_its_loss_twice_and_its_regularization_once(eagerly):
    model = line(activity_regularizer=regularizers.L2(0.3), kernel_regularizer=regularizers.L2(0.2))

    def called_twice(model, x, y):
        return squared_error(model, x, y) + 0 * ops.sum(model(x))

    returned = training(model, keras.optimizers.SGD(0.1), loss_fn=called_twice)(X, Y)
    activity = 0.3 * np.sum((X @ W + B) ** 2) / len(X)
    close(returned, by_hand(W, B)[0] + 2 * activity + 0.2 * np.sum(W**2))


def test_a_layer_whose_losses_the_function_did_not_read_is_included_beside_one_that_it_did():
    read, left = (layers.Dense(1, kernel_regularizer=regularizers.L2(0.3)) for _ in range(2))
    for layer in (read, left):
        layer.build((None, 2))
        layer.set_weights([W, B])
    returned = hl.minimize(
        lambda: ops.sum(read(X) + left(X)) + sum(read.losses), [read, left], keras.optimizers.SGD(0.1)
    )
    close(returned, 2 * np.sum(X @ W + B) + 2 * 0.3 * np.sum(W**2))


def test_the_compiled_loss_of_a_model_includes_them_once(eagerly):
    """`compute_loss` reads `model.losses`."""
    model = hl.Model([keras.Input((2,)), layers.Dense(1, kernel_regularizer=regularizers.L2(0.3))])
    model.set_weights([W, B])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    step = hl.function(lambda x, y: model.minimize(lambda: model.compute_loss(x, y, model(x))))
    close(step(X, Y), by_hand(W, B)[0] + 0.3 * np.sum(W**2))
    close(model.get_weights()[0], W - 0.1 * (by_hand(W, B)[1] + 0.6 * W))


def test_a_variable_brings_its_own_regularizer():
    model = line(kernel_regularizer=regularizers.L2(0.3))
    kernel = model.layers[-1].kernel
    returned = training(model, keras.optimizers.SGD(0.1), wrt=[kernel])(X, Y)
    close(returned, by_hand(W, B)[0] + 0.3 * np.sum(W**2))


def test_penalties_of_what_is_not_trained_stay_out(eagerly):
    """A generator's update has nothing to do with the discriminator's regularization, nor with its added losses."""
    generator = layers.Dense(2)
    discriminator = layers.Dense(1, kernel_regularizer="l2", activity_regularizer="l2")
    generator.build((None, 2))
    discriminator.build((None, 2))
    optimizer, x = keras.optimizers.SGD(0.1), ops.convert_to_tensor(X)
    expected = value_of(ops.mean(discriminator(generator(x))))
    step = hl.function(lambda x: hl.minimize(lambda: ops.mean(discriminator(generator(x))), generator, optimizer))
    close(step(X), expected)


# ---------------------------------------------------------------------- what is not reached


def test_no_variable_reached_names_them_all(eagerly):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, name="head")])
    step = training(model, keras.optimizers.SGD(0.1), loss_fn=lambda model, x, y: ops.mean(y))
    with pytest.raises(GradientError, match=r"head/kernel, .*head/bias.*must itself call the layers"):
        step(X, Y)


def test_predictions_computed_outside_are_a_constant():
    model = line()
    y_pred = model(X)
    with pytest.raises(GradientError, match="what was computed outside of it is a constant"):
        hl.minimize(lambda: ops.mean((y_pred - ops.convert_to_tensor(Y)) ** 2), model, keras.optimizers.SGD(0.1))


def test_an_error_leaves_the_weights_as_they_were():
    model, optimizer = line(), keras.optimizers.SGD(0.1)
    with pytest.raises(GradientError):
        training(model, optimizer, loss_fn=lambda model, x, y: model(x))(X, Y)
    np.testing.assert_array_equal(model.get_weights()[0], W)
    close(training(model, optimizer)(X, Y), by_hand(W, B)[0])


class Mishap(Exception):
    pass


def test_an_error_of_the_users_own_comes_out_as_it_was_raised(eagerly):
    def loss_fn(model, x, y):
        raise Mishap("in the loss")

    with pytest.raises(Mishap, match="in the loss"):
        training(line(), keras.optimizers.SGD(0.1), loss_fn=loss_fn)(X, Y)


def test_variables_not_reached_stay_to_the_bit(eagerly):
    model, optimizer = line(), keras.optimizers.Adam(0.1)
    step = training(model, optimizer, loss_fn=lambda model, x, y: ops.sum(model.layers[-1].kernel ** 2))
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        step(X, Y)
    assert np.all(model.get_weights()[0] != W)
    np.testing.assert_array_equal(model.get_weights()[1], B)


def test_a_loss_that_is_no_scalar_shows_its_shape():
    with pytest.raises(GradientError, match=r"shape \(3, 1\).*keras\.ops\.sum"):
        training(line(), keras.optimizers.SGD(0.1), loss_fn=lambda model, x, y: model(x))(X, Y)


@pytest.mark.parametrize("kernel_regularizer", [None, "l2"])
@pytest.mark.parametrize("loss", [None, (1.0, 2.0), "text"], ids=repr)
def test_a_loss_that_is_no_tensor_is_shown(loss, kernel_regularizer):
    model = line(kernel_regularizer=kernel_regularizer)
    with pytest.raises(GradientError, match="must return a floating-point tensor; it returned"):
        hl.minimize(lambda: loss, model, keras.optimizers.SGD(0.1))


def test_a_position_cannot_be_trained():
    with pytest.raises(GradientError, match="wrt takes positions of arguments"):
        hl.minimize(lambda: 1.0, 0, keras.optimizers.SGD(0.1))


# ---------------------------------------------------------------------- the wrong optimizer


@pytest.mark.parametrize("optimizer", ["sgd", None, keras.optimizers.SGD], ids=repr)
def test_what_is_no_optimizer_is_refused(optimizer):
    w = keras.Variable(3.0)
    with pytest.raises(OptimizerError, match=r"takes a Keras optimizer; received .*keras\.optimizers\.Adam\(1e-3\)"):
        hl.minimize(lambda: w**2, w, optimizer)
    close(w.numpy(), 3)


def test_an_optimizer_of_other_variables_says_what_to_do(eagerly):
    mine, other = keras.Variable(3.0, name="mine"), keras.Variable(3.0, name="other")
    optimizer = keras.optimizers.Adam(0.1, name="taken")
    optimizer.build([other])
    step = hl.function(lambda: hl.minimize(lambda: mine**2, mine, optimizer))
    with pytest.raises(OptimizerError, match=r"'taken' was built for other variables than \['mine'\].*for each part"):
        step()
    close(mine.numpy(), 3)


# ---------------------------------------------------------------------- loss scaling


def test_a_fixed_loss_scale_changes_nothing_but_precision(eagerly):
    model = line()
    returned = training(model, keras.optimizers.SGD(0.1, loss_scale_factor=128.0))(X, Y)
    loss, by_w, _ = by_hand(W, B)
    close(returned, loss)
    close(model.get_weights()[0], W - 0.1 * by_w)


def test_gradients_are_clipped_unscaled():
    model = line()
    training(model, keras.optimizers.SGD(0.1, clipnorm=1.0, loss_scale_factor=128.0))(100 * X, Y)
    close(np.linalg.norm(model.get_weights()[0] - W), 0.1)


SCALING = [keras.optimizers.LossScaleOptimizer, hl.optimizers.LossScaleOptimizer]
each_scaling = pytest.mark.parametrize("scaling", SCALING, ids=["of Keras", "of Handloom"])


@each_scaling
def test_the_loss_returned_is_not_scaled_and_neither_is_the_update(scaling, eagerly):
    model = line()
    returned = training(model, scaling(keras.optimizers.SGD(0.1)))(X, Y)
    loss, by_w, _ = by_hand(W, B)
    close(returned, loss)
    close(model.get_weights()[0], W - 0.1 * by_w)


@each_scaling
def test_an_overflow_skips_the_update_and_halves_the_scale(scaling, eagerly):
    w, steepness = keras.Variable(2.0), keras.Variable(1e38, trainable=False)
    optimizer = scaling(keras.optimizers.Adam(0.1), initial_scale=16.0)
    step = hl.function(lambda: hl.minimize(lambda: w * steepness, w, optimizer))
    step()  # 16e38 is beyond float32.
    close([w.numpy(), optimizer.dynamic_scale.numpy()], [2, 8])
    assert int(optimizer.inner_optimizer.iterations.value) == 0
    steepness.assign(1.0)
    close(step(), 2)
    close([w.numpy(), optimizer.dynamic_scale.numpy()], [1.9, 8])


def test_the_smallest_of_two_scales_serves_both():
    model = hl.Model([keras.Input((2,)), layers.Dense(1), layers.Dense(1)])
    model.first, model.last = model.layers
    small, large = (hl.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), scale) for scale in (2.0, 1e38))
    model.compile({"first": small, "last": large})
    x, y = ops.convert_to_tensor(10 * X), ops.convert_to_tensor(Y)
    expected = hl.grad(lambda: squared_error(model, x, y), wrt=model)()
    before = model.get_weights()
    training(model, model.optimizer)(x, y)
    for now, then, gradient in zip(model.get_weights(), before, expected, strict=True):
        close(now, then - 0.1 * value_of(gradient))


def test_float16_without_a_scaled_loss_warns():
    keras.config.set_dtype_policy("mixed_float16")
    half = layers.Dense(1, name="half")
    half.build((None, 2))
    optimizer = keras.optimizers.SGD(0.1)
    with pytest.warns(HandloomWarning, match=r"'half' computes in float16.*handloom\.optimizers\.LossScaleOptimizer"):
        hl.minimize(lambda: ops.mean(ops.cast(half(X), "float32")), half, optimizer)


def test_float16_gradients_too_small_for_it_survive_by_scaling(eagerly):
    keras.config.set_dtype_policy("mixed_float16")
    half = layers.Dense(1, kernel_initializer="ones", use_bias=False)
    half.build((None, 2))
    optimizer = hl.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e8))
    step = hl.function(lambda x: hl.minimize(lambda: 1e-9 * ops.mean(ops.cast(half(x), "float32")), half, optimizer))
    step(X)
    close(half.kernel, 1 - 0.1 * np.mean(X, axis=0)[:, None], rtol=1e-2)


def test_bfloat16_needs_no_scaling():
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = layers.Dense(1)
    half.build((None, 2))
    hl.minimize(lambda: ops.mean(ops.cast(half(X), "float32")), half, keras.optimizers.SGD(0.1))


# ---------------------------------------------------------------------- exactly once


def test_metrics_batch_statistics_and_seeds_move_once(eagerly):
    seeds = keras.random.SeedGenerator(7)
    normalize = layers.BatchNormalization(momentum=0.5)
    dense, total = layers.Dense(1), keras.metrics.Sum()
    normalize.build((None, 2))
    dense.build((None, 2))
    optimizer = keras.optimizers.SGD(0.1)
    before = value_of(seeds.state)

    @hl.function
    def step(x):
        def loss_fn():
            output = dense(normalize(x, training=True)) + keras.random.normal((3, 1), seed=seeds)
            total.update_state(ops.ones(()))
            return ops.mean(output**2)

        return hl.minimize(loss_fn, [dense, normalize], optimizer)

    step(X)
    close(total.result(), 1)
    close(normalize.moving_mean, 0.5 * np.mean(X, axis=0))
    close(normalize.moving_variance, 0.5 + 0.5 * np.var(X, axis=0))
    close(value_of(seeds.state) - before, [0, 1])
    assert int(optimizer.iterations.value) == 1


def test_the_loss_function_runs_on_the_weights_before_the_update(eagerly):
    w, seen = keras.Variable(3.0), keras.Variable(0.0, trainable=False)

    def loss_fn():
        seen.assign(w)
        return w**2

    optimizer = keras.optimizers.SGD(0.1)
    hl.function(lambda: hl.minimize(loss_fn, w, optimizer))()
    close([seen.numpy(), w.numpy()], [3, 2.4])
