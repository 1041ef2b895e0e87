"""Rows A: loops written by hand."""

import io

import keras
import numpy as np
import pytest
from keras import layers, ops
from rich.console import Console
from sklearn.model_selection import train_test_split

import handloom as hl
from handloom.callbacks import ProgressBar
from tests.rows import curves
from tests.rows.figures import below
from tests.rows.real_data import diabetes, digits, tumours, wines


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def whole_batch_regression_by_hand():
    """The run `curves.a1` in NumPy: the loss before each of 100 updates by Adam (Kingma and Ba, 2015)."""
    x, y = (array.astype("float64") for array in diabetes())
    weights = [weight.astype("float64") for weight in curves.start((10, 16), 16, (16, 1), 1)]
    means, squares = [0.0] * 4, [0.0] * 4
    losses = []
    for step in range(1, 101):
        w1, b1, w2, b2 = weights
        hidden = np.tanh(x @ w1 + b1)
        off = hidden @ w2 + b2 - y
        losses.append((off**2).mean())
        slope = 2 * off / off.size
        inner = slope @ w2.T * (1 - hidden**2)
        gradients = [x.T @ inner, inner.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)]
        means = [0.9 * mean + 0.1 * gradient for mean, gradient in zip(means, gradients, strict=True)]
        squares = [0.999 * square + 0.001 * gradient**2 for square, gradient in zip(squares, gradients, strict=True)]
        rate = 0.01 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        moved = [rate * mean / (np.sqrt(square) + 1e-7) for mean, square in zip(means, squares, strict=True)]
        weights = [weight - change for weight, change in zip(weights, moved, strict=True)]
    return np.array(losses)


def test_a1_whole_batch_regression_falls_along_the_curve_of_numpy(shown):
    losses = curves.a1()["loss"]
    assert losses[-1] < 0.6 * losses[0]
    np.testing.assert_allclose(losses, whole_batch_regression_by_hand(), rtol=1e-4)
    shown(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}, along the curve of NumPy")


@pytest.mark.once  # Starts three processes.
def test_a1_whole_batch_regression_has_the_same_curve_on_three_backends(shown):
    found = curves.on_three_backends()
    for backend in found:
        np.testing.assert_allclose(found[backend]["a1/loss"], found["jax"]["a1/loss"], rtol=1e-4, err_msg=backend)
    apart = np.ptp([curve["a1/loss"] for curve in found.values()], axis=0)
    shown(f"the curves of three backends apart by {below(apart.max())}")


def two_headed():
    inputs = keras.Input((64,))
    hidden = layers.Dense(32, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, [layers.Dense(10, name="digit")(hidden), layers.Dense(1, name="ink")(hidden)])


def two_losses_by_hand(weights, pixels, labels, ink):
    """The losses of both heads, and the gradients of half their sum with respect to the heads' kernels."""
    w, b, w_digit, b_digit, w_ink, b_ink = weights
    hidden = np.tanh(pixels @ w + b)
    chances, off = softmax(hidden @ w_digit + b_digit), hidden @ w_ink + b_ink - ink
    losses = [-np.log(chances[range(len(labels)), labels]).mean(), (off**2).mean()]
    slopes = [(chances - np.eye(10)[labels]) / len(labels), 2 * off / len(labels)]
    return losses, [0.5 * hidden.T @ slope for slope in slopes]


def test_a2_two_outputs_with_two_losses_weighted_a_half_each(shown):
    pixels, labels = (array[:512] for array in digits())
    ink = pixels.mean(axis=1, keepdims=True)
    ink, pixels = (ink - ink.mean()) / ink.std(), pixels - pixels.mean(axis=0)
    model, optimizer = two_headed(), keras.optimizers.SGD(0.1, momentum=0.9)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    squared = keras.losses.MeanSquaredError()

    @hl.function
    def train_step(pixels, labels, ink):
        def loss_fn():
            digit_logits, ink_drawn = model(pixels, training=True)
            losses = crossentropy(labels, digit_logits), squared(ink, ink_drawn)
            return 0.5 * losses[0] + 0.5 * losses[1], losses

        return hl.minimize(loss_fn, model, optimizer, has_aux=True)

    before = model.get_weights()
    expected, gradients = two_losses_by_hand(before, pixels, labels, ink)
    total, losses = train_step(pixels, labels, ink)
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-4)
    assert float(total) == pytest.approx(0.5 * expected[0] + 0.5 * expected[1], rel=1e-4)
    for index, gradient in zip((2, 4), gradients, strict=True):
        np.testing.assert_allclose(before[index] - model.get_weights()[index], 0.1 * gradient, rtol=1e-3, atol=1e-5)
    for _ in range(100):
        _, losses = train_step(pixels, labels, ink)
    assert float(losses[0]) < 0.5 * np.log(10)  # Of what knowing nothing costs: all digits alike, the mean ink.
    assert float(losses[1]) < 0.5 * 1
    shown(f"losses from {expected[0]:.2f} and {expected[1]:.2f} to {float(losses[0]):.3f} and {float(losses[1]):.3f}")


def softmax_regression_by_hand(pixels, labels, batch_size, epochs=1, rate=0.5):
    """SGD from zero in NumPy: for each epoch and example its loss, and whether it was told right, when it was seen."""
    kernel, bias = np.zeros((64, 10)), np.zeros(10)
    losses, right = np.empty((2, epochs, len(pixels)))
    for epoch in range(epochs):
        for first in range(0, len(pixels), batch_size):
            batch = slice(first, first + batch_size)
            x, y = pixels[batch], labels[batch]
            chances = softmax(x @ kernel + bias)
            losses[epoch, batch] = -np.log(chances[range(len(y)), y])
            right[epoch, batch] = chances.argmax(axis=1) == y
            slope = (chances - np.eye(10)[y]) / len(y)
            kernel, bias = kernel - rate * x.T @ slope, bias - rate * slope.sum(axis=0)
    return losses, right


def softmax_regression(rate=0.5):
    """A step by hand, and the metric that it updates."""
    model = keras.Sequential([keras.Input((64,)), layers.Dense(10, kernel_initializer="zeros")])
    optimizer = keras.optimizers.SGD(rate)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    def train_step(pixels, labels):
        def loss_fn():
            logits = model(pixels, training=True)
            return crossentropy(labels, logits), logits

        loss, logits = hl.minimize(loss_fn, model, optimizer, has_aux=True)
        accuracy.update_state(labels, logits)
        return {"loss": loss, "accuracy": accuracy.result()}

    return train_step, accuracy


def test_a3_a_streaming_metric_is_that_of_its_epoch_when_it_is_reset(eagerly, shown):
    pixels, labels = (array[:160] for array in digits())
    step, accuracy = softmax_regression()
    train_step, epochs = hl.function(step), []
    for _ in range(3):
        accuracy.reset_state()
        for batch in hl.Feed((pixels, labels), batch_size=40):
            logs = train_step(*batch)
        assert float(logs["accuracy"]) == float(accuracy.result())
        epochs.append(float(accuracy.result()))
    _, right = softmax_regression_by_hand(pixels, labels, batch_size=40, epochs=3)
    np.testing.assert_allclose(epochs, right.mean(axis=1), rtol=1e-6)
    assert epochs[0] < epochs[1] < epochs[2]  # So that an epoch more or less would show.
    shown(f"accuracy of each epoch: {', '.join(f'{value:.3f}' for value in epochs)}")


def test_a3_a_streaming_metric_is_that_of_its_epoch_in_fit_without_a_word(eagerly):
    pixels, labels = (array[:160] for array in digits())
    step, _ = softmax_regression()
    history = hl.fit(step, hl.Feed((pixels, labels), batch_size=40), epochs=3, verbose=0).history
    _, right = softmax_regression_by_hand(pixels, labels, batch_size=40, epochs=3)
    np.testing.assert_allclose(history["accuracy"], right.mean(axis=1), rtol=1e-6)


def test_a4_a_classifier_tells_digits_apart(capsys, shown):
    train, test, y_train, y_test = train_test_split(*digits(), test_size=0.2, random_state=0)
    model = keras.Sequential([keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)])
    optimizer = keras.optimizers.Adam(5e-3)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    @hl.function
    def train_step(pixels, labels):
        return hl.minimize(lambda: crossentropy(labels, model(pixels, training=True)), model, optimizer)

    @hl.function
    def test_step(pixels, labels):
        accuracy.update_state(labels, model(pixels, training=False))

    feed, step = hl.Feed((train, y_train), batch_size=32, shuffle=True), 0
    for _ in range(5):
        for batch in feed:
            loss = train_step(*batch)
            step += 1
            if step % 200 == 0:
                print(f"step {step}: loss {float(loss):.4f}")
    for batch in hl.Feed((test, y_test)):
        test_step(*batch)
    assert step == 5 * len(feed) == 5 * 45
    assert capsys.readouterr().out.startswith("step 200: loss 0.")
    assert float(accuracy.result()) > 0.95
    shown(f"accuracy on digits held out: {float(accuracy.result()):.3f}")


def by_own_loop(step, feed):
    step, mean_loss = hl.function(step), keras.metrics.Mean()
    for pixels, labels in feed:
        logs = step(pixels, labels)
        mean_loss.update_state(logs["loss"], sample_weight=len(pixels))
    return float(mean_loss.result()), float(logs["accuracy"])


def by_fit(step, feed):
    history = hl.fit(step, feed, verbose=0).history
    return history["loss"][0], history["accuracy"][0]


@pytest.mark.parametrize("loop", [by_own_loop, by_fit])
def test_a5_the_epoch_means_weigh_the_smaller_last_batch_right(loop, eagerly, shown):
    pixels, labels = (array[:70] for array in digits())
    order = np.argsort(labels)  # The last batch has digits that no other has, and so a loss of its own.
    pixels, labels = pixels[order], labels[order]
    [losses], [right] = softmax_regression_by_hand(pixels, labels, batch_size=32)
    mean_of_batch_means = np.mean([batch.mean() for batch in np.split(losses, [32, 64])])
    assert mean_of_batch_means > 1.01 * losses.mean()  # What would be wrong shows.
    step, _ = softmax_regression()
    found = loop(step, hl.Feed((pixels, labels), batch_size=32))
    assert found == pytest.approx((losses.mean(), right.mean()), rel=1e-4)
    shown(f"mean loss {found[0]:.3f}; the mean of batch means would be {mean_of_batch_means:.3f}")


def test_a6_linear_regression_follows_the_closed_form_for_1000_epochs(shown):
    """Off the least squares solution, full-batch gradient descent multiplies by (1 - 2 r A'A / n) each time."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, 100)
    y = 2 * x + 1 + random.normal(scale=0.1, size=100)
    slope, intercept, optimizer = keras.Variable(0.0), keras.Variable(0.0), keras.optimizers.SGD(0.01)

    @hl.function
    def train_step(x, y):
        hl.minimize(lambda: ops.mean((slope * x + intercept - y) ** 2), [slope, intercept], optimizer)
        return slope.value, intercept.value

    found = [[float(value) for value in train_step(x, y)] for _ in range(1000)]
    a = np.stack([x, np.ones(100)], axis=1)
    solution = np.linalg.lstsq(a, y)[0]
    shrink = np.eye(2) - 2 * 0.01 * a.T @ a / 100
    off, expected = -solution, []
    for _ in range(1000):
        off = shrink @ off
        expected.append(solution + off)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found[-1], [2, 1], atol=0.1)
    shown(f"1000 updates off the closed form by {below(np.abs(np.subtract(found, expected)).max())}")


def mean_absolute_error(y, y_pred):
    return ops.mean(ops.abs(y - y_pred), axis=-1)


def test_a7_a_plain_function_as_a_metric_in_a_step_equals_numpy(eagerly):
    x, y = wines()
    model, optimizer = keras.Sequential([keras.Input((12,)), layers.Dense(1)]), keras.optimizers.SGD(0.1)

    @hl.function
    def train_step(x, y):
        def loss_fn():
            y_pred = model(x, training=True)
            return ops.mean((y - y_pred) ** 2), ops.mean(mean_absolute_error(y, y_pred))

        return hl.minimize(loss_fn, model, optimizer, has_aux=True)

    for batch in zip(np.split(x, 2), np.split(y, 2), strict=True):
        kernel, bias = model.get_weights()
        _, mae = train_step(*batch)
        assert float(mae) == pytest.approx(np.abs(batch[0] @ kernel + bias - batch[1]).mean(), rel=1e-5)


def test_a7_a_plain_function_as_a_compiled_metric_equals_numpy(eagerly, shown):
    x, y = wines()
    model = hl.Model([layers.Dense(1)])
    model.compile(loss="mse", metrics=[mean_absolute_error])
    found = model.evaluate(x, y, verbose=0, return_dict=True)["mean_absolute_error"]
    kernel, bias = model.get_weights()
    expected = np.abs(x @ kernel + bias - y).mean()
    assert found == pytest.approx(expected, rel=1e-5)
    shown(f"mean absolute error {found:.3f}, as in NumPy")


def test_a8_a_learning_rate_changed_in_the_loop_counts_at_once_without_a_retrace(shown):
    w, optimizer = keras.Variable(4.0), keras.optimizers.SGD(0.1)

    @hl.function
    def train_step():
        return hl.minimize(lambda: w**2, w, optimizer)

    expected, rate, found = 4.0, 0.1, []
    for _ in range(30):
        loss = float(train_step())
        assert loss == pytest.approx(expected**2, rel=1e-4)
        expected -= rate * 2 * expected
        assert float(ops.convert_to_numpy(w)) == pytest.approx(expected, rel=1e-4)
        found.append(loss)
        if loss < 1 and rate == 0.1:
            rate = 0.1 * 0.1
            optimizer.learning_rate = float(optimizer.learning_rate) * 0.1
    assert found[-1] < 1 < found[0]
    assert rate == pytest.approx(0.01)
    assert len(train_step.traces) == 1
    shown(f"rate from 0.1 to {float(optimizer.learning_rate):.2f}, {len(train_step.traces)} trace")


def imbalanced_tumours():
    """Tumours to train on of which hardly any is malignant, and others to test on."""
    x, malignant = tumours()
    places = [np.flatnonzero(malignant == kind) for kind in (0, 1)]
    chosen = np.concatenate([places[0][:200], places[1][:6]])
    chosen = np.random.default_rng(0).permutation(chosen)
    rest = np.setdiff1d(np.arange(len(x)), chosen)
    return (x[chosen], malignant[chosen]), (x[rest], malignant[rest])


class TumourDetector:
    """A body that stays as it is, a head that is trained, and how much each class counts."""

    def __init__(self):
        keras.utils.set_random_seed(0)
        self.body, self.head = layers.Dense(16, "tanh"), layers.Dense(1)
        self.model = keras.Sequential([keras.Input((30,)), self.body, self.head])
        self.optimizer = keras.optimizers.SGD(0.2)
        self.seen = keras.Variable([0.0, 0.0], trainable=False)
        self.class_weights = keras.Variable([1.0, 1.0], trainable=False)

    def train_step(self, x, malignant):
        def loss_fn():
            logits = self.model(x, training=True)[:, 0]
            losses = ops.softplus(logits) - logits * ops.cast(malignant, "float32")
            return ops.mean(losses * ops.take(self.class_weights, malignant))

        loss, gradients = hl.value_and_grad(loss_fn, wrt=self.model)()
        self.optimizer.apply(gradients[2:], self.head.trainable_variables)
        self.seen.assign_add(ops.sum(ops.one_hot(malignant, 2), axis=0))
        return {"loss": loss}

    def weigh(self):
        """As in `class_weight="balanced"` of scikit-learn, by what was seen so far."""
        self.class_weights.assign(ops.sum(self.seen) / (2 * ops.maximum(self.seen, 1.0)))

    def recall(self, x, malignant):
        found = ops.convert_to_numpy(self.model(x))[:, 0] > 0
        return found[malignant == 1].mean()


def never(detector):
    return detector.train_step, ()


def in_the_step(detector):
    def step(x, malignant):
        detector.weigh()
        return detector.train_step(x, malignant)

    return step, ()


def in_a_callback(detector):
    weigh = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: detector.weigh())
    return detector.train_step, (weigh,)


def detector_trained(recompute):
    train, _ = imbalanced_tumours()
    detector = TumourDetector()
    step, callbacks = recompute(detector)
    hl.fit(step, hl.Feed(train, batch_size=32), epochs=10, callbacks=callbacks, verbose=0)
    return detector


@pytest.mark.parametrize("recompute", [in_the_step, in_a_callback])
def test_a9_class_weights_recomputed_from_what_was_seen_raise_the_rare_classs_recall(recompute, shown):
    (_, malignant), test = imbalanced_tumours()
    detector = detector_trained(recompute)
    np.testing.assert_array_equal(detector.seen, 10 * np.bincount(malignant))
    balanced = len(malignant) / (2 * np.bincount(malignant))
    # In the step they are one batch behind.
    np.testing.assert_allclose(detector.class_weights, balanced, rtol=0.05 if recompute is in_the_step else 1e-6)
    recall, unweighted = detector.recall(*test), detector_trained(never).recall(*test)
    assert recall > unweighted + 0.1
    shown(f"recall of the rare class {recall:.2f}; unweighted {unweighted:.2f}")


def test_a9_the_update_by_the_class_weights_of_the_moment_is_that_of_numpy():
    (x, malignant), _ = imbalanced_tumours()
    detector = TumourDetector()
    step, _ = in_the_step(detector)
    step, seen = hl.function(step), np.zeros(2)
    for batch in (slice(0, 40), slice(40, 90), slice(90, 206)):
        w1, b1, w2, b2 = detector.model.get_weights()
        hidden, rare = np.tanh(x[batch] @ w1 + b1), malignant[batch]
        weights = seen.sum() / (2 * np.maximum(seen, 1))
        slope = weights[rare] * (sigmoid((hidden @ w2 + b2)[:, 0]) - rare) / len(rare)
        step(x[batch], rare)
        found = detector.model.get_weights()
        np.testing.assert_allclose(found[2], w2 - 0.2 * hidden.T @ slope[:, None], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[3], b2 - 0.2 * slope.sum(), rtol=1e-4, atol=1e-6)
        seen += np.bincount(rare, minlength=2)


def test_a9_the_rest_of_the_weights_stays_to_the_bit(shown):
    untrained, trained = TumourDetector(), detector_trained(in_the_step)
    for index, (one, other) in enumerate(zip(untrained.model.get_weights(), trained.model.get_weights(), strict=True)):
        assert np.array_equal(one, other) == (index < 2)
    shown("what is not trained stays to the bit")


def nadam_by_hand(x, y, kernel, steps, rate, penalty):
    """Linear regression with an l2 penalty and no negative weights, by Nadam (Dozat, 2016): losses, then kernels."""
    kernel, mean, square, product = kernel.astype("float64"), 0.0, 0.0, 1.0
    losses, kernels = [], []
    for step in range(1, steps + 1):
        off = x @ kernel - y
        losses.append((off**2).mean() + penalty * (kernel**2).sum())
        gradient = 2 * x.T @ off / len(x) + 2 * penalty * kernel
        momentum, next_momentum = (0.9 * (1 - 0.5 * 0.96**when) for when in (step, step + 1))
        product *= momentum
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        ahead = next_momentum * mean / (1 - product * next_momentum) + (1 - momentum) * gradient / (1 - product)
        kernel = np.maximum(kernel - rate * ahead / (np.sqrt(square / (1 - 0.999**step)) + 1e-7), 0)
        kernels.append(kernel)
    return losses, kernels


class Kernels(keras.callbacks.Callback):
    """Looks at the weights after every batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(ops.convert_to_numpy(self.layer.kernel).copy())


@pytest.mark.parametrize("adds_them", [True, False], ids=["adds model.losses itself", "leaves them to minimize"])
def test_a10_an_l2_regularized_net_with_constraints_follows_nadam(adds_them, eagerly, shown):
    x, y = diabetes()
    layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1), kernel_constraint="non_neg")
    model, optimizer = keras.Sequential([keras.Input((10,)), layer]), keras.optimizers.Nadam(0.05)
    layer.kernel.assign(np.linspace(0, 1, 10)[:, None])
    losses, kernels = nadam_by_hand(x, y, np.linspace(0, 1, 10)[:, None], steps=20, rate=0.05, penalty=0.1)

    def train_step(x, y):
        def loss_fn():
            loss = ops.mean((model(x, training=True) - y) ** 2)
            return loss + sum(model.losses) if adds_them else loss

        return {"loss": hl.minimize(loss_fn, model, optimizer)}

    looking = Kernels(layer)
    history = hl.fit(train_step, hl.Feed((x, y), batch_size=442), epochs=20, callbacks=[looking], verbose=0).history
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(looking.seen, kernels, rtol=1e-3, atol=1e-5)
    assert all((kernel >= 0).all() for kernel in looking.seen)
    assert any((kernel == 0).any() for kernel in kernels[1:])  # The constraint had something to do.
    shown(f"20 steps off Nadam in NumPy by {below(np.abs(np.subtract(looking.seen, kernels)).max())}")


def test_a10_a_constraint_holds_after_every_step(eagerly, shown):
    layer = layers.Dense(16, activation="relu", kernel_constraint=keras.constraints.MaxNorm(0.5))
    model, optimizer = keras.Sequential([keras.Input((10,)), layer, layers.Dense(1)]), keras.optimizers.Nadam(0.01)

    def train_step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)}

    looking = Kernels(layer)
    hl.fit(train_step, hl.Feed(diabetes(), batch_size=64), epochs=2, callbacks=[looking], verbose=0)
    norms = [np.linalg.norm(kernel, axis=0) for kernel in looking.seen]
    assert len(norms) == 14
    assert np.max(norms) == pytest.approx(0.5, rel=1e-4)
    shown(f"largest norm {np.max(norms):.3f} of 0.5 allowed, in {len(norms)} steps")


def test_a10_the_training_flag_reaches_dropout_and_batch_normalization(eagerly):
    normalize, drop = layers.BatchNormalization(momentum=0.9), layers.Dropout(0.5, seed=0)
    model = keras.Sequential([keras.Input((10,)), normalize, drop])
    x = diabetes()[0][:200] + 3

    @hl.function
    def forward(x, training):
        return model(x, training=training)

    out = ops.convert_to_numpy(forward(x, training=True))
    mean, variance = x.mean(axis=0), x.var(axis=0)
    np.testing.assert_allclose(normalize.moving_mean, 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(normalize.moving_variance, 0.9 + 0.1 * variance, rtol=1e-3)
    kept = out != 0
    assert kept.mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(out[kept], (2 * (x - mean) / np.sqrt(variance + 1e-3))[kept], rtol=1e-3, atol=1e-4)

    moved = [ops.convert_to_numpy(statistic) for statistic in (normalize.moving_mean, normalize.moving_variance)]
    out = ops.convert_to_numpy(forward(x, training=False))
    np.testing.assert_allclose(out, (x - moved[0]) / np.sqrt(moved[1] + 1e-3), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(normalize.moving_mean, moved[0])


def test_a10_the_status_bar_shows_epochs_steps_speed_and_the_loss():
    model, optimizer = keras.Sequential([keras.Input((10,)), layers.Dense(1)]), keras.optimizers.Nadam(0.01)

    def train_step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)}

    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar = ProgressBar(terminal)
    history = hl.fit(train_step, hl.Feed(diabetes(), batch_size=64), epochs=2, callbacks=[bar], verbose=0).history
    shown = terminal.file.getvalue()
    for words in ("Epoch 1/2", "Epoch 2/2", "7/7", "steps/s", "left", f"loss {history['loss'][1]:.4f}"):
        assert words in shown


RATE = 0.5


def clipped(gradient):
    """At most 1 long."""
    return gradient / max(np.linalg.norm(gradient), 1)


def linear_gan_step_by_hand(weights, real, noise):
    """Both gradients of a GAN of two linear layers, each clipped by norm, and how long the four were."""
    a, c, w, b = weights
    drawn = noise @ a + c
    on_real, on_drawn = -sigmoid(-(real @ w + b)) / len(real), sigmoid(drawn @ w + b) / len(real)
    of_critic = [real.T @ on_real + drawn.T @ on_drawn, (on_real + on_drawn).sum(axis=0)]
    w, b = (weight - RATE * clipped(gradient) for weight, gradient in zip((w, b), of_critic, strict=True))
    on_drawn = -sigmoid(-(drawn @ w + b)) / len(real) @ w.T
    of_artist = [noise.T @ on_drawn, on_drawn.sum(axis=0)]
    a, c = (weight - RATE * clipped(gradient) for weight, gradient in zip((a, c), of_artist, strict=True))
    return [a, c, w, b], [np.linalg.norm(gradient) for gradient in (*of_artist, *of_critic)]


class LinearGAN:
    """A GAN whose generator and discriminator are one linear layer each, with a step by hand."""

    def __init__(self):
        self.generator, self.discriminator = layers.Dense(2), layers.Dense(1)
        self.generator.build((None, 3))
        self.discriminator.build((None, 2))
        self.g_optimizer = keras.optimizers.SGD(RATE, clipnorm=1.0)
        self.d_optimizer = keras.optimizers.SGD(RATE, clipnorm=1.0)

    def get_weights(self):
        return [*self.generator.get_weights(), *self.discriminator.get_weights()]

    @hl.function
    def train_step(self, real, noise):
        def d_loss():
            drawn = self.generator(noise)
            judged_real, judged_drawn = self.discriminator(real), self.discriminator(drawn)
            return ops.mean(ops.softplus(-judged_real)) + ops.mean(ops.softplus(judged_drawn))

        def g_loss():
            return ops.mean(ops.softplus(-self.discriminator(self.generator(noise))))

        return (
            hl.minimize(d_loss, self.discriminator, self.d_optimizer),
            hl.minimize(g_loss, self.generator, self.g_optimizer),
        )


def points_and_noise():
    random = np.random.default_rng(0)
    real = random.normal(loc=[6, -2], scale=0.5, size=(64, 2))
    return real.astype("float32"), random.normal(loc=2, scale=4, size=(64, 3)).astype("float32")


def test_a12_a_gan_with_two_gradients_a_step_each_clipped_by_norm(eagerly, shown):
    gan, (real, noise) = LinearGAN(), points_and_noise()
    expected, lengths = gan.get_weights(), []
    for _ in range(10):
        expected, of_this_step = linear_gan_step_by_hand(expected, real, noise)
        lengths.append(of_this_step)
        gan.train_step(real, noise)
        for found, right in zip(gan.get_weights(), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4)
    long, short = np.max(lengths, axis=0) > 1, np.min(lengths, axis=0) < 1
    assert long[[0, 2]].all()  # Both kernels had something to clip,
    assert short[[1, 3]].all()  # both biases had not, at times.
    shown(f"gradients up to {np.max(lengths):.1f} long, clipped to 1.0 as in NumPy")


@pytest.mark.parametrize("still", ["generator", "discriminator"])
def test_a12_each_optimizer_moves_only_its_own_network(still, eagerly, shown):
    gan, (real, noise) = LinearGAN(), points_and_noise()
    getattr(gan, f"{still[0]}_optimizer").learning_rate = 0.0
    before = {name: getattr(gan, name).get_weights() for name in ("generator", "discriminator")}
    for _ in range(3):
        gan.train_step(real, noise)
    for name, weights in before.items():
        for weight, now in zip(weights, getattr(gan, name).get_weights(), strict=True):
            assert np.array_equal(weight, now) == (name == still)
    shown("the other network stays to the bit")


BINS = 4


def crossed_tumours():
    """Measurements; and as sparse features the bins of the first six, crossed in pairs and hashed. And labels."""
    x, malignant = tumours()
    edges = np.quantile(x[:, :6], [0.25, 0.5, 0.75], axis=0)
    bins = (x[:, None, :6] > edges).sum(axis=1)
    cross = layers.HashedCrossing(num_bins=BINS**2, output_mode="one_hot")
    pairs = [(bins[:, [left]], bins[:, [right]]) for left, right in zip(*np.triu_indices(6, k=1), strict=True)]
    crossings = [ops.convert_to_numpy(cross(pair)) for pair in pairs]
    return {"deep": x, "wide": np.concatenate(crossings, axis=1).astype("float32")}, malignant[:, None]


def test_a13_of_each_crossing_of_bins_one_feature_holds():
    inputs, _ = crossed_tumours()
    assert inputs["wide"].shape == (569, 15 * BINS**2)
    np.testing.assert_array_equal(inputs["wide"].sum(axis=1), 15)


class WideAndDeep(hl.Model):
    def __init__(self):
        super().__init__()
        self.wide = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        self.deep = keras.Sequential([layers.Dense(8, "tanh"), layers.Dense(1)])

    def call(self, inputs):
        return self.wide(inputs["wide"]) + self.deep(inputs["deep"])


def wide_and_deep():
    inputs, malignant = crossed_tumours()
    model = WideAndDeep()
    model.compile(
        optimizer={
            "wide": keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.05),
            "deep": keras.optimizers.Adam(0.01),
        },
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )
    model({name: array[:1] for name, array in inputs.items()})
    return model, inputs, malignant


def ftrl_by_hand(weight, gradient, total, linear, rate=0.1, l1=0.05):
    """One update of follow the regularized leader (McMahan et al., 2013): weight, total and linear after it."""
    news = total + gradient**2
    linear = linear + gradient - (np.sqrt(news) - np.sqrt(total)) / rate * weight
    return (np.clip(linear, -l1, l1) - linear) / (np.sqrt(news) / rate), news, linear


def adam_by_hand(weight, gradient, mean, square, step, rate=0.01):
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    rate *= np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return weight - rate * mean / (np.sqrt(square) + 1e-7), mean, square


def test_a13_the_wide_path_moves_by_ftrl_and_the_deep_one_by_adam(shown):
    model, inputs, malignant = wide_and_deep()
    wide, *deep = (weight.astype("float64") for weight in model.get_weights())
    slots, total, linear = [(0.0, 0.0)] * 4, np.full_like(wide, 0.1), np.zeros_like(wide)
    for step in range(1, 6):
        w1, b1, w2, b2 = deep
        hidden = np.tanh(inputs["deep"] @ w1 + b1)
        slope = (sigmoid(inputs["wide"] @ wide + hidden @ w2 + b2) - malignant) / len(malignant)
        inner = slope @ w2.T * (1 - hidden**2)
        gradients = [inputs["deep"].T @ inner, inner.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)]
        wide, total, linear = ftrl_by_hand(wide, inputs["wide"].T @ slope, total, linear)
        moved = [adam_by_hand(*part, step) for part in zip(deep, gradients, *zip(*slots, strict=True), strict=True)]
        deep, slots = [part[0] for part in moved], [part[1:] for part in moved]
        model.train_on_batch(inputs, malignant)
        for found, expected in zip(model.get_weights(), [wide, *deep], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    unused = (wide == 0).mean()
    assert 0.1 < unused < 0.9  # The penalty of Ftrl keeps some of the wide weights at nothing, and only those.
    shown(f"5 steps along those of NumPy; Ftrl keeps {unused:.2f} of the wide weights at zero")


@pytest.mark.parametrize("still", ["wide", "deep"])
def test_a13_each_path_moves_under_its_own_optimizer(still):
    model, inputs, malignant = wide_and_deep()
    model.optimizer[still].learning_rate = 1e-30  # Ftrl takes no 0.
    before = {name: getattr(model, name).get_weights() for name in ("wide", "deep")}
    model.train_on_batch(inputs, malignant)
    for name, weights in before.items():
        after = getattr(model, name).get_weights()
        moved = [not np.allclose(*pair, atol=1e-20) for pair in zip(weights, after, strict=True)]
        assert moved == len(weights) * [name != still]
    assert [int(optimizer.iterations) for optimizer in model.optimizer.values()] == [1, 1]


def test_a13_wide_and_deep_together_learn(shown):
    model, inputs, malignant = wide_and_deep()
    accuracy = model.fit(inputs, malignant, epochs=5, verbose=0).history["accuracy"][-1]
    assert accuracy > 0.95
    shown(f"accuracy on tumours {accuracy:.3f}")
