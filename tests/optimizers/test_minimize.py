"""One update by `hl.minimize`, against NumPy and against Keras's optimizers that are given the gradients."""

import keras
import numpy as np
import pytest
from keras import layers, ops, regularizers

import handloom as hl
from handloom.errors import GradientError, HandloomWarning, OptimizerError, TraceError
from tests.models import built, sequential
from tests.numbers import close, each_close, numpy, ones, same

X = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]], "float32")
Y = np.array([[1.0], [2.0], [-1.0]], "float32")
W = np.array([[0.5], [-0.25]], "float32")
B = np.array([0.1], "float32")
SGD = keras.optimizers.SGD


def line(**options):
    """A linear model from known weights."""
    model = sequential(layers.Dense(1, **options), inputs=2, cls=keras.Sequential)
    model.set_weights([W, B])
    return model


def squared_error(model, x, y):
    return ops.mean((model(x) - y) ** 2)


def by_hand(w=W, b=B):
    """The squared error of the line and its two gradients, in NumPy."""
    residual = X @ w + b - Y
    return np.mean(residual**2), 2 / len(X) * X.T @ residual, 2 * np.mean(residual, axis=0)


def training(model, optimizer, wrt=None, loss_fn=squared_error):
    """A compiled function that updates the model once."""

    @hl.function
    def step(x, y):
        return hl.minimize(lambda: loss_fn(model, x, y), model if wrt is None else wrt, optimizer)

    return step


def step_of(loss_fn, wrt, optimizer, **options):
    """The result of one compiled update."""
    return hl.function(lambda: hl.minimize(loss_fn, wrt, optimizer, **options))()


# ---------------------------------------------------------------------- one optimizer


def test_minimize_takes_the_step_computed_by_hand(eagerly):
    model = line()
    returned = training(model, SGD(0.1))(X, Y)
    loss, by_w, by_b = by_hand()
    close(returned, loss)
    each_close(model.get_weights(), [W - 0.1 * by_w, B - 0.1 * by_b])


OPTIMIZERS = {
    "momentum": lambda: SGD(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.05),
    "weight decay": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "clipped by global norm": lambda: SGD(0.1, global_clipnorm=0.5),
    "averaged weights": lambda: SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: SGD(0.1, gradient_accumulation_steps=2),
    "schedule": lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.05),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_minimize_equals_keras_apply_with_the_gradients_given(make):
    model, twin = line(), line()
    step, optimizer = training(model, make()), make()
    for _ in range(3):
        step(X, Y)
        _, *gradients = by_hand(*twin.get_weights())
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], twin.trainable_variables)
    each_close(model.get_weights(), twin.get_weights(), rtol=1e-4)


def test_minimize_builds_a_layer_in_its_first_update(eagerly):
    dense, known = layers.Dense(1, kernel_initializer="ones"), line()
    known.set_weights([np.ones((2, 1)), np.zeros(1)])
    first, twin = (training(model, keras.optimizers.Adam(0.05)) for model in (dense, known))
    for _ in range(2):
        close(first(X, Y), twin(X, Y))
    close(dense.kernel, known.get_weights()[0])


# ---------------------------------------------------------------------- wrt


@pytest.mark.parametrize(
    "gathered",
    [list, tuple, lambda pair: {"a": pair[0], "b": pair[1]}, lambda pair: {"deep": [pair[0], (pair[1],)]}],
    ids=["list", "tuple", "dict", "nested"],
)
def test_minimize_with_wrt_as_a_structure_of_variables(gathered):
    a, b = keras.Variable(2.0), keras.Variable(3.0)
    close(hl.minimize(lambda: a**2 * b, gathered([a, b]), SGD(0.1)), 12)
    close([a, b], [2 - 0.1 * 12, 3 - 0.1 * 4])


def test_minimize_with_wrt_as_a_layer_and_a_variable():
    dense, scale = built(layers.Dense(1, use_bias=False, kernel_initializer="ones"), 2), keras.Variable(3.0)
    hl.minimize(lambda: ops.sum(dense(X)) * scale, {"layer": dense, "scale": scale}, SGD(0.1))
    close(dense.kernel, 1 - 0.1 * 3 * np.sum(X, axis=0)[:, None])
    close(scale, 3 - 0.1 * np.sum(X))


def test_minimize_with_wrt_as_one_variable_moves_only_that():
    model = line()
    training(model, SGD(0.1), wrt=model.layers[-1].bias)(X, Y)
    same(model.get_weights()[0], W)
    close(model.get_weights()[1], B - 0.1 * by_hand()[2])


def test_minimize_called_twice_in_a_step_uses_the_weights_of_the_first_update(eagerly):
    w, optimizer = keras.Variable(3.0), SGD(0.1)
    step = hl.function(lambda: [hl.minimize(lambda: w**2, w, optimizer) for _ in range(2)])
    close([*step(), w], [9, 2.4**2, 0.8 * 2.4])


def test_minimize_trains_either_part_with_an_optimizer_built_for_both():
    a, b = keras.Variable(2.0), keras.Variable(3.0)
    optimizer = SGD(0.1, momentum=0.9)
    optimizer.build([a, b])
    hl.minimize(lambda: a * b, a, optimizer)
    close([a, b], [2 - 0.3, 3])
    hl.minimize(lambda: a * b, b, optimizer)
    close([a, b], [1.7, 3 - 0.17])


# ---------------------------------------------------------------------- aux


def test_minimize_with_has_aux_returns_the_loss_and_anything_else(eagerly):
    model, optimizer = line(), SGD(0.1)

    @hl.function
    def step(x, y):
        def loss_fn():
            y_pred = model(x)
            return ops.mean((y_pred - y) ** 2), {"y_pred": y_pred, "rest": ("text", None)}

        return hl.minimize(loss_fn, model, optimizer, has_aux=True)

    loss, aux = step(X, Y)
    close(loss, by_hand()[0])
    close(aux["y_pred"], X @ W + B)
    assert aux["rest"] == ("text", None)


def test_minimize_with_has_aux_requires_a_pair():
    w = keras.Variable(3.0)
    with pytest.raises(GradientError, match=r"has_aux=True the function must return a pair .* it returned .*HL115"):
        hl.minimize(lambda: w**2, w, SGD(0.1), has_aux=True)


# ---------------------------------------------------------------------- regularizers and added losses


def with_losses(model, x, y):
    return squared_error(model, x, y) + sum(model.losses)


def with_losses_of_the_layer(model, x, y):
    error = squared_error(model, x, y)
    return error + sum(model.layers[-1].losses)


def beside_losses(model, x, y):
    error = squared_error(model, x, y)
    _ = sum(model.losses)  # To report it.
    return error


def with_losses_and_beside(model, x, y):
    error = squared_error(model, x, y)
    _ = sum(model.losses)
    return error + sum(model.losses)


each_way = pytest.mark.parametrize(
    "loss_fn",
    [squared_error, with_losses, with_losses_of_the_layer, beside_losses, with_losses_and_beside],
    ids=lambda fn: fn.__name__,
)
L2 = regularizers.L2(0.3)


@each_way
def test_minimize_counts_a_regularizer_once(loss_fn, eagerly):
    model = line(kernel_regularizer=L2)
    returned = training(model, SGD(0.1), loss_fn=loss_fn)(X, Y)
    loss, by_w, by_b = by_hand()
    close(returned, loss + 0.3 * np.sum(W**2))
    each_close(model.get_weights(), [W - 0.1 * (by_w + 0.6 * W), B - 0.1 * by_b])


@each_way
def test_minimize_counts_an_activity_regularizer_once(loss_fn, eagerly):
    model = line(activity_regularizer=L2)
    returned = training(model, SGD(0.1), loss_fn=loss_fn)(X, Y)
    output = X @ W + B
    loss, by_w, by_b = by_hand()
    close(returned, loss + 0.3 * np.sum(output**2) / len(X))  # Keras takes the mean over the batch.
    by_w, by_b = by_w + 0.6 * X.T @ output / len(X), by_b + 0.6 * np.mean(output, axis=0)
    each_close(model.get_weights(), [W - 0.1 * by_w, B - 0.1 * by_b])


@each_way
def test_minimize_counts_a_loss_that_depends_on_no_trained_variable_once(loss_fn, eagerly):
    frozen = layers.Dense(2, kernel_initializer="identity", activity_regularizer=L2, trainable=False)
    model = sequential(frozen, layers.Dense(1), inputs=2, cls=keras.Sequential)
    model.layers[-1].set_weights([W, B])
    returned = training(model, SGD(0.1), loss_fn=loss_fn)(X, Y)
    loss, by_w, by_b = by_hand()
    close(returned, loss + 0.3 * np.sum(X**2) / len(X))
    each_close(model.layers[-1].get_weights(), [W - 0.1 * by_w, B - 0.1 * by_b])


class AddingALoss(keras.Model):
    """A model that adds a loss itself, and whose only variables are those of its layer."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        y = self.dense(x)
        self.add_loss(0.05 * ops.mean(y**2))
        return y


@pytest.mark.parametrize("loss_fn", [squared_error, with_losses, beside_losses], ids=lambda fn: fn.__name__)
def test_minimize_counts_an_added_loss_once_and_not_that_of_an_earlier_call(loss_fn, eagerly):
    model = AddingALoss()
    model(100 * X)
    model.set_weights([W, B])
    returned = training(model, SGD(0.1), loss_fn=loss_fn)(X, Y)
    output = X @ W + B
    loss, by_w, _ = by_hand()
    close(returned, loss + 0.05 * np.mean(output**2))
    close(model.get_weights()[0], W - 0.1 * (by_w + 0.1 * X.T @ output / len(X)))


def test_minimize_with_a_layer_called_twice_adds_its_loss_twice_and_its_regularization_once(eagerly):
    model = line(activity_regularizer=L2, kernel_regularizer=L2)

    def called_twice(model, x, y):
        return squared_error(model, x, y) + 0 * ops.sum(model(x))

    returned = training(model, SGD(0.1), loss_fn=called_twice)(X, Y)
    activity = 0.3 * np.sum((X @ W + B) ** 2) / len(X)
    close(returned, by_hand()[0] + 2 * activity + 0.3 * np.sum(W**2))


def test_minimize_adds_each_regularization_that_the_loss_does_not_include(eagerly):
    included, reported, stopped, _ = parts = [built(layers.Dense(1, kernel_regularizer=L2), 2) for _ in range(4)]
    for layer in parts:
        layer.set_weights([W, B])

    def loss_fn():
        seen = [sum(layer.losses) for layer in (included, reported, stopped)]
        return ops.sum(sum(layer(X) for layer in parts)) + 2 * seen[0], (seen[1], ops.stop_gradient(seen[2]))

    loss, aux = step_of(loss_fn, parts, SGD(0.1), has_aux=True)
    penalty = 0.3 * np.sum(W**2)
    close(loss, 4 * np.sum(X @ W + B) + (2 + 1 + 1 + 1) * penalty)
    close(aux, [penalty, penalty])
    for layer, count in zip(parts, (2, 1, 1, 1), strict=True):
        close(layer.kernel, W - 0.1 * (np.sum(X, axis=0)[:, None] + count * 0.6 * W))


@pytest.mark.parametrize("before", [False, True], ids=["", "read before"])
@pytest.mark.parametrize("through", [0, 1], ids=["the value", "the gradient"])
def test_minimize_adds_a_regularization_that_is_read_in_an_inner_gradient_unless_its_value_is_in_the_loss(
    through, before, eagerly
):
    model = line(kernel_regularizer=L2)

    def loss_fn(model, x, y):
        _ = model.losses if before else ()
        inner = hl.value_and_grad(lambda x: ops.sum(model(x)) + sum(model.losses))(x)
        return ops.sum(inner[through])

    returned = training(model, SGD(0.1), [model.layers[-1].kernel], loss_fn)(X, Y)
    close(returned, (np.sum(X @ W + B) if through == 0 else len(X) * np.sum(W)) + 0.3 * np.sum(W**2))
    by_w = np.sum(X, axis=0)[:, None] if through == 0 else len(X)
    close(model.get_weights()[0], W - 0.1 * (by_w + 0.6 * W))


def test_minimize_counts_a_loss_that_is_added_in_an_inner_gradient(eagerly):
    """A penalty on the gradient of a discriminator whose activity is regularized."""
    model = line(activity_regularizer=L2)

    def loss_fn(model, x, y):
        return ops.sum(hl.grad(lambda x: ops.sum(model(x)))(x) ** 2)

    returned = training(model, SGD(0.1), loss_fn=loss_fn)(X, Y)
    output = X @ W + B
    close(returned, len(X) * np.sum(W**2) + 0.3 * np.sum(output**2) / len(X))
    close(model.get_weights()[0], W - 0.1 * (2 * len(X) * W + 0.6 * X.T @ output / len(X)))


def test_minimize_counts_a_regularization_that_is_read_in_a_branch(eagerly):
    model = line(kernel_regularizer=L2)

    def loss_fn(model, x, y):
        error = squared_error(model, x, y)
        return error + ops.cond(error > 0, lambda: sum(model.losses), lambda: ops.zeros(()))

    close(training(model, SGD(0.1), loss_fn=loss_fn)(X, Y), by_hand()[0] + 0.3 * np.sum(W**2))


def test_minimize_with_a_variable_includes_its_regularizer():
    model = line(kernel_regularizer=L2)
    returned = training(model, SGD(0.1), wrt=[model.layers[-1].kernel])(X, Y)
    close(returned, by_hand()[0] + 0.3 * np.sum(W**2))


def test_minimize_leaves_out_the_penalties_of_layers_that_it_does_not_train(eagerly):
    """The update of a generator excludes the penalties of its discriminator."""
    generator = built(layers.Dense(2), 2)
    discriminator = built(layers.Dense(1, kernel_regularizer="l2", activity_regularizer="l2"), 2)
    expected = numpy(ops.mean(discriminator(generator(ops.convert_to_tensor(X)))))
    close(step_of(lambda: ops.mean(discriminator(generator(X))), generator, SGD(0.1)), expected)


# ---------------------------------------------------------------------- what is not reached


def test_minimize_treats_predictions_computed_outside_as_constants_and_names_the_variables(eagerly):
    model, optimizer = line(name="head"), SGD(0.1)

    @hl.function
    def step(x, y):
        y_pred = model(x)
        return hl.minimize(lambda: ops.mean((y_pred - y) ** 2), model, optimizer)

    with pytest.raises(GradientError, match=r"head/kernel, .*head/bias.*outside.*constants.*Call the layers.*HL124"):
        step(X, Y)


def test_minimize_leaves_the_weights_when_the_loss_function_raises_the_users_error(eagerly):
    def loss_fn(model, x, y):
        raise KeyError("in the loss")

    model, optimizer = line(), SGD(0.1)
    with pytest.raises(KeyError, match="in the loss"):
        training(model, optimizer, loss_fn=loss_fn)(X, Y)
    same(model.get_weights()[0], W)
    close(training(model, optimizer)(X, Y), by_hand()[0])


def test_minimize_leaves_variables_that_are_not_reached(eagerly):
    model = line()
    step = training(model, keras.optimizers.Adam(0.1), loss_fn=lambda model, x, y: ops.sum(model.weights[0] ** 2))
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        step(X, Y)
    assert np.all(model.get_weights()[0] != W)
    same(model.get_weights()[1], B)


@pytest.mark.parametrize("loss", [None, (1.0, 2.0), "text"], ids=repr)
def test_minimize_with_a_regularizer_and_a_loss_that_is_not_a_tensor_shows_the_loss(loss):
    with pytest.raises(GradientError, match="must return a floating-point tensor; it returned"):
        hl.minimize(lambda: loss, line(kernel_regularizer="l2"), SGD(0.1))


# ---------------------------------------------------------------------- the wrong optimizer


@pytest.mark.parametrize("optimizer", ["sgd", None, SGD], ids=repr)
def test_minimize_requires_an_optimizer(optimizer):
    w = keras.Variable(3.0)
    with pytest.raises(OptimizerError, match=r"takes a Keras optimizer; received .*Adam\(1e-3\).*HL312"):
        hl.minimize(lambda: w**2, w, optimizer)
    close(w, 3)


def test_minimize_names_the_order_of_its_arguments():
    w = keras.Variable(3.0)
    with pytest.raises(OptimizerError, match=r"received a tensor .*minimize\(loss_fn, wrt, optimizer\), with .*HL312"):
        hl.minimize(lambda: w**2, SGD(0.1), w)


def test_minimize_with_an_optimizer_built_for_others_says_what_to_do(eagerly):
    mine, other = keras.Variable(3.0, name="mine"), keras.Variable(3.0, name="other")
    optimizer = keras.optimizers.Adam(0.1, name="taken")
    optimizer.build([other])
    with pytest.raises(OptimizerError, match=r"'taken' was built for others than mine.*per part.*HL315"):
        step_of(lambda: mine**2, mine, optimizer)
    close(mine, 3)


# ---------------------------------------------------------------------- loss scaling


def test_minimize_clips_gradients_that_a_fixed_loss_scale_factor_scaled(eagerly):
    model = line()
    returned = training(model, SGD(0.1, clipnorm=1.0, loss_scale_factor=128.0))(100 * X, Y)
    close(returned, np.mean((100 * X @ W + B - Y) ** 2))
    close(np.linalg.norm(model.get_weights()[0] - W), 0.1)


@pytest.mark.parametrize("of", [keras.optimizers, hl.optimizers], ids=["Keras", "Handloom"])
def test_minimize_with_a_loss_scale_optimizer_skips_an_overflow_and_returns_the_unscaled_loss(of, eagerly):
    w, steepness = keras.Variable(2.0), keras.Variable(1e38, trainable=False)
    optimizer = of.LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=16.0)
    step = hl.function(lambda: hl.minimize(lambda: w * steepness, w, optimizer))
    step()  # 16e38 is beyond float32.
    close([w, optimizer.dynamic_scale, optimizer.inner_optimizer.iterations], [2, 8, 0])
    steepness.assign(1.0)
    close(step(), 2)
    close([w, optimizer.dynamic_scale], [1.9, 8])


def test_minimize_with_two_loss_scales_uses_the_smaller():
    model = sequential(layers.Dense(1), layers.Dense(1), inputs=2)
    model.first, model.last = model.layers
    small, large = (hl.optimizers.LossScaleOptimizer(SGD(0.1), scale) for scale in (2.0, 1e38))
    model.compile({"first": small, "last": large})
    x, y, before = ops.convert_to_tensor(10 * X), ops.convert_to_tensor(Y), model.get_weights()
    gradients = hl.grad(lambda: squared_error(model, x, y), wrt=model)()
    training(model, model.optimizer)(x, y)
    expected = [then - 0.1 * numpy(gradient) for then, gradient in zip(before, gradients, strict=True)]
    each_close(model.get_weights(), expected)


def half(**options):
    return built(layers.Dense(1, name="half", **options), 2)


def mean_of(layer):
    return lambda: ops.mean(ops.cast(layer(X), "float32"))


def test_minimize_in_float16_without_a_scaled_loss_warns():
    keras.config.set_dtype_policy("mixed_float16")
    layer = half()
    with pytest.warns(HandloomWarning, match=r"'half' computes in float16.*LossScaleOptimizer.*HL314"):
        hl.minimize(mean_of(layer), layer, SGD(0.1))


def test_minimize_in_float16_keeps_small_gradients_by_scaling(eagerly):
    keras.config.set_dtype_policy("mixed_float16")
    layer = half(kernel_initializer="ones", use_bias=False)
    step_of(lambda: 1e-9 * mean_of(layer)(), layer, hl.optimizers.LossScaleOptimizer(SGD(1e8)))
    close(layer.kernel, 1 - 0.1 * np.mean(X, axis=0)[:, None], rtol=1e-2)


def test_minimize_in_bfloat16_needs_no_scaling():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = half()
    hl.minimize(mean_of(layer), layer, SGD(0.1))


# ---------------------------------------------------------------------- exactly once


def test_minimize_updates_metrics_batch_statistics_and_seeds_once(eagerly):
    seeds, total = keras.random.SeedGenerator(7), keras.metrics.Sum()
    normalize, dense = built(layers.BatchNormalization(momentum=0.5), 2), built(layers.Dense(1), 2)
    optimizer, before = SGD(0.1), numpy(seeds.state).copy()

    def loss_fn():
        output = dense(normalize(X, training=True)) + keras.random.normal((3, 1), seed=seeds)
        total.update_state(ops.ones(()))
        return ops.mean(output**2)

    step_of(loss_fn, [dense, normalize], optimizer)
    close(total.result(), 1)
    close(normalize.moving_mean, 0.5 * np.mean(X, axis=0))
    close(normalize.moving_variance, 0.5 + 0.5 * np.var(X, axis=0))
    same(numpy(seeds.state) - before, [0, 1])
    assert int(optimizer.iterations.value) == 1


@pytest.mark.parametrize("weight", ["tokens", np.ones(3)], ids=repr)
def test_minimize_refuses_a_weight_that_is_no_scalar(weight):
    w = keras.Variable(1.0)
    with pytest.raises(ValueError, match=r"weight=...\) takes a number or a scalar tensor; received .*HL337"):
        hl.minimize(lambda: 2 * w, w, SGD(0.1), weight=weight)


def test_minimize_refuses_a_loss_that_is_no_function():
    w = keras.Variable(1.0)
    with pytest.raises(GradientError, match=r"takes a function that returns the loss; received .*lambda.*HL338"):
        hl.minimize(ops.sum(w), w, SGD(0.1))


@pytest.mark.backend("jax")
@pytest.mark.parametrize("built", [False, True])
def test_minimize_on_jax_of_an_episode_played_inside_the_loss_function_names_the_line(built):
    policy = layers.Dense(2)
    if built:
        policy.build((None, 3))

    def loss():
        scores = policy(ones(1, 3))
        reward = 1.0 if float(ops.max(scores)) > 0 else 2.0
        return ops.sum(scores) * reward

    with pytest.raises(TraceError, match=r"reward = 1\.0 if float.* episode.*before the call of minimize.*HL128"):
        hl.minimize(loss, policy, keras.optimizers.SGD(0.1))
