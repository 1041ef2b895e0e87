"""Rows A1 to A10, A12 and A13: loops written by hand."""

import io
import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops
from rich.console import Console
from sklearn.model_selection import train_test_split

import handloom as hl
from handloom.callbacks import ProgressBar
from tests.models import built, functional, sequential
from tests.numbers import close, each_close, numpy, same
from tests.rows import by_numpy, curves
from tests.rows.by_numpy import sigmoid
from tests.rows.figures import below
from tests.rows.real_data import diabetes, digits, tumours, wines

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_a1_minimize_on_the_whole_batch_follows_the_curve_of_numpy(shown):
    adam = by_numpy.Adam(0.01)

    def update(weights, x, y):
        gradients, losses = by_numpy.two_layer_regression(weights, x, y)
        return adam.updated(weights, gradients), losses

    losses = curves.a1()["loss"]
    expected, _ = by_numpy.train(update, diabetes(), curves.start((10, 16), 16, (16, 1), 1), epochs=100)
    close(losses, expected.mean(axis=1), rtol=1e-4)
    assert losses[-1] < 0.6 * losses[0]
    shown(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}, along the curve of NumPy")


@pytest.mark.once  # Starts three processes.
def test_a1_minimize_on_the_whole_batch_has_the_same_curve_on_three_backends(shown):
    difference = curves.assert_same_on_three_backends("a1/loss")
    shown(f"the curves of three backends differ by {below(difference)}")


def test_a2_minimize_takes_two_losses_weighted_a_half_each(shown):
    pixels, labels = (array[:512] for array in digits())
    ink = pixels.mean(axis=1, keepdims=True)
    ink, pixels = (ink - ink.mean()) / ink.std(), pixels - pixels.mean(axis=0)
    inputs = keras.Input((64,))
    hidden = layers.Dense(32, "tanh")(inputs)
    model = keras.Model(inputs, [layers.Dense(10)(hidden), layers.Dense(1)(hidden)])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    squared = keras.losses.MeanSquaredError()

    @hl.function
    def train_step(pixels, labels, ink):
        def loss_fn():
            logits, drawn = model(pixels, training=True)
            losses = CROSSENTROPY(labels, logits), squared(ink, drawn)
            return 0.5 * losses[0] + 0.5 * losses[1], losses

        return hl.minimize(loss_fn, model, optimizer, has_aux=True)

    history = []
    for _ in range(100):
        total, losses = train_step(pixels, labels, ink)
        history.append([float(loss) for loss in losses])
        close(total, np.dot([0.5, 0.5], history[-1]), rtol=1e-4)
    (digit_first, ink_first), (digit, drawn) = history[0], history[-1]
    assert digit < 0.5 * np.log(10)  # Half the loss of a guess: all digits are equally likely, the ink is the mean.
    assert drawn < 0.5 * 1
    shown(f"losses from {digit_first:.2f} and {ink_first:.2f} to {digit:.3f} and {drawn:.3f}, their sum weighted")


def softmax_regression():
    """A step by hand that also updates a metric."""
    model = sequential(layers.Dense(10, use_bias=False, kernel_initializer="zeros"), inputs=64)
    optimizer, accuracy = keras.optimizers.SGD(0.5), keras.metrics.SparseCategoricalAccuracy()

    def train_step(pixels, labels):
        def loss_fn():
            logits = model(pixels, training=True)
            return CROSSENTROPY(labels, logits), logits

        loss, logits = hl.minimize(loss_fn, model, optimizer, has_aux=True)
        accuracy.update_state(labels, logits)
        return {"loss": loss, "accuracy": accuracy.result()}

    return train_step, accuracy


def by_own_loop(feed, epochs):
    """The loss and the accuracy by epoch."""
    (step, accuracy), mean_loss, history = softmax_regression(), keras.metrics.Mean(), []
    step = hl.function(step)
    for _ in range(epochs):
        accuracy.reset_state()
        mean_loss.reset_state()
        for pixels, labels in feed:
            logs = step(pixels, labels)
            mean_loss.update_state(logs["loss"], sample_weight=len(pixels))
        assert float(logs["accuracy"]) == float(accuracy.result())
        history.append([float(mean_loss.result()), float(accuracy.result())])
    return np.transpose(history)


def by_fit(feed, epochs):
    step, _ = softmax_regression()
    history = hl.fit(step, feed, epochs=epochs, verbose=0).history
    return history["loss"], history["accuracy"]


loops = pytest.mark.parametrize("loop", [by_own_loop, by_fit])


@loops
def test_a3_a_metric_in_a_step_has_the_value_of_its_epoch(loop, eagerly, shown):
    data = [array[:160] for array in digits()]
    _, accuracy = loop(hl.Feed(tuple(data), batch_size=40), epochs=3)
    _, right = by_numpy.softmax_regression(data, epochs=3, batch_size=40)
    close(accuracy, right.mean(axis=1))
    assert accuracy[0] < accuracy[1] < accuracy[2]  # One epoch more or less would show.
    shown(f"accuracy by epoch: {', '.join(f'{value:.3f}' for value in accuracy)}")


@loops
def test_a5_fit_and_a_loop_by_hand_weight_the_smaller_last_batch_right(loop, eagerly, shown):
    pixels, labels = (array[:70] for array in digits())
    order = np.argsort(labels)  # The last batch has digits that no other batch has, and so a loss of its own.
    data = pixels[order], labels[order]
    [losses], [right] = by_numpy.softmax_regression(data)
    mean_of_batch_means = np.mean([batch.mean() for batch in np.split(losses, [32, 64])])
    assert mean_of_batch_means > 1.01 * losses.mean()  # The wrong mean would show.
    [loss], [accuracy] = loop(hl.Feed(data, batch_size=32), epochs=1)
    close([loss, accuracy], [losses.mean(), right.mean()], rtol=1e-4)
    shown(f"mean loss {loss:.3f}; the mean of batch means would be {mean_of_batch_means:.3f}")


def test_a4_minimize_trains_a_classifier_of_digits(capsys, shown):
    train, test, y_train, y_test = train_test_split(*digits(), test_size=0.2, random_state=0)
    model = sequential(layers.Dense(128, "relu"), layers.Dense(10), inputs=64)
    optimizer, accuracy = keras.optimizers.Adam(5e-3), keras.metrics.SparseCategoricalAccuracy()

    @hl.function
    def train_step(pixels, labels):
        return hl.minimize(lambda: CROSSENTROPY(labels, model(pixels, training=True)), model, optimizer)

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
    shown(f"accuracy on held-out digits: {float(accuracy.result()):.3f}")


def test_a6_minimize_follows_the_closed_form_for_1000_epochs(shown):
    """Each update of full-batch gradient descent multiplies the distance to the least squares by 1 - 2 r A'A / n."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, 100)
    y = 2 * x + 1 + random.normal(scale=0.1, size=100)
    slope, intercept, optimizer = keras.Variable(0.0), keras.Variable(0.0), keras.optimizers.SGD(0.01)

    @hl.function
    def train_step(x, y):
        hl.minimize(lambda: ops.mean((slope * x + intercept - y) ** 2), [slope, intercept], optimizer)
        return slope.value, intercept.value

    found = np.array([[float(value) for value in train_step(x, y)] for _ in range(1000)])
    a = np.stack([x, np.ones(100)], axis=1)
    solution = np.linalg.lstsq(a, y)[0]
    shrink = np.eye(2) - 2 * 0.01 * a.T @ a / 100
    off, expected = -solution, []
    for _ in range(1000):
        off = shrink @ off
        expected.append(solution + off)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    close(found[-1], [2, 1], atol=0.1)
    shown(f"1000 updates differ from the closed form by {below(np.abs(found - expected).max())}")


def mean_absolute_error(y, y_pred):
    return ops.mean(ops.abs(y - y_pred), axis=-1)


def test_a7_a_plain_function_is_a_metric_in_a_step(eagerly, shown):
    x, y = wines()
    model, optimizer = sequential(inputs=12), keras.optimizers.SGD(0.1)

    @hl.function
    def train_step(x, y):
        def loss_fn():
            y_pred = model(x, training=True)
            return ops.mean((y - y_pred) ** 2), ops.mean(mean_absolute_error(y, y_pred))

        return hl.minimize(loss_fn, model, optimizer, has_aux=True)

    for batch in zip(np.split(x, 2), np.split(y, 2), strict=True):
        kernel, bias = model.get_weights()
        _, mae = train_step(*batch)
        close(mae, np.abs(batch[0] @ kernel + bias - batch[1]).mean())
    shown(f"mean absolute error {float(mae):.3f}, as in NumPy")


def test_a8_minimize_uses_a_changed_learning_rate_at_once_without_a_retrace(shown):
    w, optimizer = keras.Variable(4.0), keras.optimizers.SGD(0.1)

    @hl.function
    def train_step():
        return hl.minimize(lambda: w**2, w, optimizer)

    expected, rate, found = 4.0, 0.1, []
    for _ in range(30):
        found.append(float(train_step()))
        close(found[-1], expected**2, rtol=1e-4)
        expected -= rate * 2 * expected
        close(w, expected, rtol=1e-4)
        if found[-1] < 1 and rate == 0.1:
            rate = 0.1 * 0.1
            optimizer.learning_rate = float(optimizer.learning_rate) * 0.1
    assert found[-1] < 1 < found[0]
    assert rate == pytest.approx(0.01)
    assert len(train_step.traces) == 1
    shown(f"rate from 0.1 to {float(optimizer.learning_rate):.2f}, {len(train_step.traces)} trace")


def imbalanced_tumours():
    """Training data with very few malignant tumours; and the other tumours, to test on."""
    x, malignant = tumours()
    chosen = np.concatenate([np.flatnonzero(malignant == 0)[:200], np.flatnonzero(malignant == 1)[:6]])
    chosen = np.random.default_rng(0).permutation(chosen)
    rest = np.setdiff1d(np.arange(len(x)), chosen)
    return (x[chosen], malignant[chosen]), (x[rest], malignant[rest])


class TumourDetector:
    """A fixed body, a trained head, and class weights that follow the classes seen so far."""

    def __init__(self, weighted=True):
        keras.utils.set_random_seed(0)
        self.body, self.head = layers.Dense(16, "tanh"), layers.Dense(1)
        self.model = sequential(self.body, self.head, inputs=30)
        self.optimizer, self.weighted = keras.optimizers.SGD(0.2), weighted
        self.seen = keras.Variable([0.0, 0.0], trainable=False)

    def train_step(self, x, malignant):
        # As `class_weight="balanced"` of scikit-learn.
        class_weights = ops.sum(self.seen) / (2 * ops.maximum(self.seen, 1.0)) if self.weighted else ops.ones(2)

        def loss_fn():
            logits = self.model(x, training=True)[:, 0]
            losses = ops.softplus(logits) - logits * ops.cast(malignant, "float32")
            return ops.mean(losses * ops.take(class_weights, malignant))

        loss, gradients = hl.value_and_grad(loss_fn, wrt=self.model)()
        self.optimizer.apply(gradients[2:], self.head.trainable_variables)
        self.seen.assign_add(ops.sum(ops.one_hot(malignant, 2), axis=0))
        return {"loss": loss}

    def recall_after_training(self):
        train, (x, malignant) = imbalanced_tumours()
        hl.fit(self.train_step, hl.Feed(train, batch_size=32), epochs=10, verbose=0)
        same(self.seen, 10 * np.bincount(train[1]))
        return (numpy(self.model(x))[malignant == 1, 0] > 0).mean()


def test_a9_value_and_grad_with_class_weights_of_what_was_seen_raises_the_recall_of_the_rare_class(shown):
    untrained, detector = TumourDetector(), TumourDetector()
    recall, unweighted = detector.recall_after_training(), TumourDetector(weighted=False).recall_after_training()
    assert recall > unweighted + 0.1
    shown(f"recall of the rare class {recall:.2f}; unweighted {unweighted:.2f}")
    pairs = zip(untrained.model.get_weights(), detector.model.get_weights(), strict=True)
    assert [np.array_equal(*pair) for pair in pairs] == [True, True, False, False]
    shown("the weights that are not trained stay bitwise identical")


@pytest.mark.parametrize("adds_them", [True, False], ids=["adds model.losses itself", "leaves them to minimize"])
def test_a10_minimize_by_nadam_adds_l2_once_and_keeps_a_constraint(adds_them, eagerly, shown):
    x, y = diabetes()
    layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1), kernel_constraint="non_neg")
    model, optimizer = sequential(layer, inputs=10), keras.optimizers.Nadam(0.05)
    layer.kernel.assign(np.linspace(0, 1, 10)[:, None])
    kernels = [numpy(layer.kernel)]

    def train_step(x, y):
        def loss_fn():
            loss = ops.mean((model(x, training=True) - y) ** 2)
            return loss + sum(model.losses) if adds_them else loss

        return {"loss": hl.minimize(loss_fn, model, optimizer)}

    looking = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: kernels.append(numpy(layer.kernel)))
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    feed, callbacks = hl.Feed((x, y), batch_size=442), [looking, ProgressBar(terminal)]
    history = hl.fit(train_step, feed, epochs=20, callbacks=callbacks, verbose=0).history
    losses = [np.mean((x @ kernel - y) ** 2) + 0.1 * np.sum(kernel**2) for kernel in kernels]
    close(history["loss"], losses[:-1], rtol=1e-4)
    assert losses[-1] < losses[0]
    assert min(kernel.min() for kernel in kernels[1:]) == 0  # The constraint had something to do, and holds.
    shown(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}, l2 included, as in NumPy")
    shown(f"smallest weight {np.min(kernels):.1f} of 0.0 allowed, in 20 steps")
    for words in ("Epoch 1/20", "Epoch 20/20", "1/1", f"loss {history['loss'][-1]:.4f}"):
        assert words in terminal.file.getvalue()


def test_a10_function_passes_the_training_flag_to_batch_normalization(eagerly):
    normalize, x = layers.BatchNormalization(momentum=0.9), diabetes()[0][:200] + 3
    model = functional(normalize, inputs=10)
    forward = hl.function(lambda x, training: model(x, training=training))
    mean, variance = x.mean(axis=0), x.var(axis=0)
    close(forward(x, training=True), (x - mean) / np.sqrt(variance + 1e-3), rtol=1e-3, atol=1e-4)
    moved = [0.1 * mean, 0.9 + 0.1 * variance]
    close(forward(x, training=False), (x - moved[0]) / np.sqrt(moved[1] + 1e-3), rtol=1e-3, atol=1e-4)
    close([normalize.moving_mean, normalize.moving_variance], moved, rtol=1e-3)


RATE = 0.5


def linear_gan_step_in_numpy(weights, real, noise):
    """One step of a GAN of two linear layers, each gradient clipped by norm; and the four norms before clipping."""

    def clipped(gradients):
        return [gradient / max(np.linalg.norm(gradient), 1) for gradient in gradients]

    a, c, w, b = weights
    drawn = noise @ a + c
    on_real, on_drawn = -sigmoid(-(real @ w + b)) / len(real), sigmoid(drawn @ w + b) / len(real)
    of_critic = [real.T @ on_real + drawn.T @ on_drawn, (on_real + on_drawn).sum(axis=0)]
    w, b = by_numpy.descended([w, b], clipped(of_critic), RATE)
    on_drawn = -sigmoid(-(drawn @ w + b)) / len(real) @ w.T
    of_artist = [noise.T @ on_drawn, on_drawn.sum(axis=0)]
    a, c = by_numpy.descended([a, c], clipped(of_artist), RATE)
    return [a, c, w, b], [np.linalg.norm(gradient) for gradient in (*of_artist, *of_critic)]


class LinearGAN:
    """A GAN with one linear layer as its generator and one as its discriminator, and a step by hand."""

    def __init__(self):
        self.generator, self.discriminator = built(layers.Dense(2), 3), built(layers.Dense(1), 2)
        self.g_optimizer, self.d_optimizer = (keras.optimizers.SGD(RATE, clipnorm=1.0) for _ in range(2))

    def get_weights(self):
        return [*self.generator.get_weights(), *self.discriminator.get_weights()]

    @hl.function
    def train_step(self, real, noise):
        def d_loss():
            judged_real, judged_drawn = self.discriminator(real), self.discriminator(self.generator(noise))
            return ops.mean(ops.softplus(-judged_real)) + ops.mean(ops.softplus(judged_drawn))

        def g_loss():
            return ops.mean(ops.softplus(-self.discriminator(self.generator(noise))))

        hl.minimize(d_loss, self.discriminator, self.d_optimizer)
        hl.minimize(g_loss, self.generator, self.g_optimizer)


def points_and_noise():
    random = np.random.default_rng(0)
    real = random.normal(loc=[6, -2], scale=0.5, size=(64, 2))
    return real.astype("float32"), random.normal(loc=2, scale=4, size=(64, 3)).astype("float32")


def test_a12_minimize_takes_two_gradients_a_step_each_clipped_by_norm(eagerly, shown):
    gan, data = LinearGAN(), points_and_noise()
    expected, norms = gan.get_weights(), []
    for _ in range(10):
        expected, of_this_step = linear_gan_step_in_numpy(expected, *data)
        norms.append(of_this_step)
        gan.train_step(*data)
        each_close(gan.get_weights(), expected, rtol=1e-3, atol=1e-4)
    largest, smallest = np.max(norms, axis=0), np.min(norms, axis=0)
    assert (largest > 1)[[0, 2]].all()  # The gradients of both kernels were clipped,
    assert (smallest < 1)[[1, 3]].all()  # those of both biases were not, at times.
    shown(f"gradient norms up to {largest.max():.1f}, clipped to 1.0; each optimizer moves its own network as in NumPy")


BINS = 4


def crossed_tumours():
    """The measurements; the bins of the first six, crossed in pairs and hashed, as sparse features; and the labels."""
    x, malignant = tumours()
    edges = np.quantile(x[:, :6], [0.25, 0.5, 0.75], axis=0)
    bins = (x[:, None, :6] > edges).sum(axis=1)
    cross = layers.HashedCrossing(num_bins=BINS**2, output_mode="one_hot")
    pairs = itertools.combinations(np.split(bins, 6, axis=1), 2)
    wide = np.concatenate([numpy(cross(pair)) for pair in pairs], axis=1).astype("float32")
    assert wide.shape == (569, 15 * BINS**2)
    same(wide.sum(axis=1), np.full(569, 15))  # One feature of each crossing holds.
    return {"deep": x, "wide": wide}, malignant[:, None]


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
    ftrl = keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.05)
    model.compile(
        optimizer={"wide": ftrl, "deep": keras.optimizers.Adam(0.01)},
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )
    model({name: array[:1] for name, array in inputs.items()})
    return model, inputs, malignant


def ftrl_in_numpy(weight, gradient, total, linear, rate=0.1, l1=0.05):
    """One update of follow the regularized leader (McMahan et al., 2013): weight, total and linear after it."""
    news = total + gradient**2
    linear = linear + gradient - (np.sqrt(news) - np.sqrt(total)) / rate * weight
    return (np.clip(linear, -l1, l1) - linear) / (np.sqrt(news) / rate), news, linear


def test_a13_compile_with_two_optimizers_moves_the_wide_path_by_ftrl_and_the_deep_one_by_adam(shown):
    model, inputs, malignant = wide_and_deep()
    wide, *deep = (weight.astype("float64") for weight in model.get_weights())
    adam, total, linear = by_numpy.Adam(0.01), np.full_like(wide, 0.1), np.zeros_like(wide)
    for _ in range(5):
        w1, b1, w2, b2 = deep
        hidden = np.tanh(inputs["deep"] @ w1 + b1)
        slope = (sigmoid(inputs["wide"] @ wide + hidden @ w2 + b2) - malignant) / len(malignant)
        deep = adam.updated(deep, by_numpy.two_layer_gradients(inputs["deep"], hidden, w2, slope))
        wide, total, linear = ftrl_in_numpy(wide, inputs["wide"].T @ slope, total, linear)
        model.train_on_batch(inputs, malignant)
        each_close(model.get_weights(), [wide, *deep], rtol=1e-3, atol=1e-5)
    unused = (wide == 0).mean()
    assert 0.1 < unused < 0.9  # The penalty of Ftrl keeps some of the wide weights at zero, and only those.
    shown(f"5 steps as in NumPy; Ftrl keeps {unused:.2f} of the wide weights at zero")


def test_a13_fit_with_two_optimizers_learns(shown):
    model, inputs, malignant = wide_and_deep()
    accuracy = model.fit(inputs, malignant, epochs=5, verbose=0).history["accuracy"][-1]
    assert accuracy > 0.95
    shown(f"accuracy on tumours {accuracy:.3f}")
