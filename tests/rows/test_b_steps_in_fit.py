"""Rows B: own steps inside `fit`."""

import csv

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.callbacks import JSONLogger
from handloom.errors import OptimizerError
from handloom.optimizers import GradientAccumulation
from handloom.report import frechet_distance, read_events
from tests.rows.real_data import diabetes, digits

RATE = 0.1


def regression_by_hand(x, y, weight=None, epochs=1, batch_size=32):
    """Linear regression from zero by SGD, in NumPy.

    Returns the errors of all examples when they were seen, by epoch, and kernel and bias in the end.
    """
    kernel, bias = np.zeros((x.shape[1], 1)), np.zeros(1)
    weight = np.ones(len(x)) if weight is None else weight
    errors = np.empty((epochs, len(x)))
    for epoch in range(epochs):
        for first in range(0, len(x), batch_size):
            batch = slice(first, first + batch_size)
            off = x[batch] @ kernel + bias - y[batch]
            errors[epoch, batch] = off[:, 0]
            slope = 2 * weight[batch, None] * off / len(off)
            kernel, bias = kernel - RATE * x[batch].T @ slope, bias - RATE * slope.sum(axis=0)
    return errors, [kernel, bias]


def linear():
    return layers.Dense(1, kernel_initializer="zeros")


class OwnStep(hl.Model):
    """The training step of Keras's guide, by `compute_loss` and the compiled metrics."""

    def train_step(self, data):
        x, y = data

        def loss_fn():
            y_pred = self(x, training=True)
            return self.compute_loss(y=y, y_pred=y_pred), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        return self.updated_metrics(loss, y, y_pred)

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        return self.updated_metrics(self.compute_loss(y=y, y_pred=y_pred), y, y_pred)

    def updated_metrics(self, loss, y, y_pred):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=len(y))
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


class Subclassed(OwnStep):
    def __init__(self):
        super().__init__()
        self.linear = linear()

    def call(self, x):
        return self.linear(x)


def functional():
    inputs = keras.Input((32,))
    return OwnStep(inputs, linear()(inputs))


def sequential():
    return OwnStep([linear()])


@pytest.mark.parametrize("build", [functional, sequential, Subclassed])
def test_b1_a_train_step_with_compute_loss_and_the_compiled_metrics(build, shown):
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, size=(1000, 32)).astype("float32")
    y = (x @ random.normal(size=(32, 1)) + random.normal(size=(1000, 1))).astype("float32")
    steps, model = [], build()
    model.compile(optimizer=keras.optimizers.SGD(RATE), loss="mse", metrics=["mae"])
    counting = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    history = model.fit(x, y, epochs=2, shuffle=False, callbacks=[counting], verbose=0).history
    errors, weights = regression_by_hand(x, y, epochs=2)
    assert steps == [*range(32), *range(32)]
    assert int(model.optimizer.iterations) == 2 * 32
    np.testing.assert_allclose(history["loss"], (errors**2).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(history["mae"], np.abs(errors).mean(axis=1), rtol=1e-4)
    for found, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    shown(f"{len(steps) // 2} steps an epoch; loss {history['loss'][-1]:.3f}, mae {history['mae'][-1]:.3f} as in NumPy")


class OwnTrackers(hl.Model):
    """An own loss, and own metrics in `metrics`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae_metric]

    def train_step(self, data):
        x, y = data

        def loss_fn():
            y_pred = self(x, training=True)
            return keras.losses.MeanSquaredError()(y, y_pred), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        self.loss_tracker.update_state(loss, sample_weight=len(x))
        self.mae_metric.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}


def test_b2_own_trackers_are_reset_each_epoch(eagerly, shown):
    x, y = diabetes()
    inputs = keras.Input((10,))
    model = OwnTrackers(inputs, linear()(inputs))
    model.compile(optimizer=keras.optimizers.SGD(RATE))
    history = model.fit(x, y, batch_size=128, epochs=3, shuffle=False, verbose=0).history
    errors, _ = regression_by_hand(x, y, epochs=3, batch_size=128)
    np.testing.assert_allclose(history["loss"], (errors**2).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(history["mae"], np.abs(errors).mean(axis=1), rtol=1e-4)
    over_all_epochs = (errors**2).mean(axis=1).cumsum() / [1, 2, 3]
    assert history["loss"][-1] < 0.95 * over_all_epochs[-1]  # What would be wrong shows.
    shown(f"loss {history['loss'][-1]:.3f}; never reset it would be {over_all_epochs[-1]:.3f}")


class WeightedStep(hl.Model):
    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_fn():
            y_pred = self(x, training=True)
            return self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        return self.compute_metrics(x, y, y_pred, sample_weight) | {"loss": loss}


@pytest.mark.parametrize("kind", ["sample_weight", "class_weight"])
def test_b3_weights_in_an_own_step_equal_weighting_by_hand(kind, eagerly, shown):
    pixels, labels = (array[:200] for array in digits())
    y = (labels == 8).astype("float32")[:, None]
    of_class = {0: 0.5, 1: 4.0}
    weight = np.where(y[:, 0] == 1, of_class[1], of_class[0])
    model = WeightedStep([linear()])
    model.compile(optimizer=keras.optimizers.SGD(RATE), loss="mse", metrics=["mae"], weighted_metrics=["mse"])
    given = {"sample_weight": weight} if kind == "sample_weight" else {"class_weight": of_class}
    history = model.fit(pixels, y, shuffle=False, verbose=0, **given).history

    [errors], weights = regression_by_hand(pixels, y, weight)
    for found, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(history["loss"], np.mean(weight * errors**2), rtol=1e-4)
    np.testing.assert_allclose(history["mse"], np.average(errors**2, weights=weight), rtol=1e-4)
    np.testing.assert_allclose(history["mae"], np.abs(errors).mean(), rtol=1e-4)  # Not a weighted metric.
    shown(f"{kind}: loss {history['loss'][0]:.3f} as in NumPy")


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": None}], ids=["unsaid", "none"])
def test_b4_a_model_without_an_optimizer_evaluates_by_its_own_test_step_as_keras_does(optimizer, eagerly, shown):
    x, y = diabetes()
    random = np.random.default_rng(0)
    weights = [random.normal(size=(10, 1)), random.normal(size=1)]
    results = []
    for base in (OwnStep, keras.Sequential):
        model = base([keras.Input((10,)), layers.Dense(1)])
        model.set_weights(weights)
        model.compile(**optimizer, loss="mse", metrics=["mae"])
        results.append(model.evaluate(x, y, verbose=0))
        results.append(list(model.evaluate(x, y, verbose=0, return_dict=True).values()))
    off = x @ weights[0] + weights[1] - y
    np.testing.assert_allclose(results, 4 * [[(off**2).mean(), np.abs(off).mean()]], rtol=1e-4)
    shown(f"loss {results[0][0]:.3f}, mae {results[0][1]:.3f}, as Keras")


def test_b4_a_model_compiled_with_no_optimizer_says_so_when_it_is_trained():
    model = OwnStep([layers.Dense(1)])
    model.compile(optimizer=None, loss="mse")
    with pytest.raises(OptimizerError, match=r"has no optimizer\. Compile it with one"):
        model.fit(*diabetes(), verbose=0)


LATENT = 16


class GAN(hl.Model):
    """The GAN of Keras's guide, its labels noisy."""

    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        self.d_loss_tracker, self.g_loss_tracker = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")
        self.seed_generator = keras.random.SeedGenerator(0)

    @property
    def metrics(self):
        return [self.d_loss_tracker, self.g_loss_tracker]

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def noise(self, count):
        return keras.random.normal((count, LATENT), seed=self.seed_generator)

    def train_step(self, real):
        count = real.shape[0]
        both = ops.concatenate([self.generator(self.noise(count), training=True), real])
        labels = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))])
        labels += 0.05 * keras.random.uniform((2 * count, 1), seed=self.seed_generator)
        noise = self.noise(count)

        def d_loss():
            return self.loss_fn(labels, self.discriminator(both, training=True))

        def g_loss():
            judged = self.discriminator(self.generator(noise, training=True), training=True)
            return self.loss_fn(ops.zeros((count, 1)), judged)

        self.d_loss_tracker.update_state(self.minimize(d_loss, self.discriminator, self.d_optimizer))
        self.g_loss_tracker.update_state(self.minimize(g_loss, self.generator, self.g_optimizer))
        return {"d_loss": self.d_loss_tracker.result(), "g_loss": self.g_loss_tracker.result()}


def digits_gan():
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    generator = keras.Sequential(
        [
            keras.Input((LATENT,)),
            layers.Dense(4 * 4 * 16, use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Reshape((4, 4, 16)),
            layers.Conv2DTranspose(16, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    return GAN(discriminator, generator)


def test_b5_a_gan_with_its_own_compile_draws_more_and_more_like_the_data(shown):
    import tensorflow as tf  # noqa: PLC0415  For its datasets, which every backend reads.

    images = digits()[0].reshape(-1, 8, 8, 1)
    dataset = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images), seed=0).repeat().batch(64)
    steps, gan = [], digits_gan()
    gan.compile(
        d_optimizer=keras.optimizers.Adam(5e-3, beta_1=0.5),
        g_optimizer=keras.optimizers.Adam(5e-3, beta_1=0.5),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    noise = np.random.default_rng(0).normal(size=(500, LATENT)).astype("float32")

    def distance():
        drawn = gan.generator.predict(noise, verbose=0)
        return frechet_distance(drawn.reshape(500, -1), images.reshape(len(images), -1))

    before = distance()
    counting = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    history = gan.fit(dataset.take(100), callbacks=[counting], verbose=0).history
    assert steps == list(range(100))
    assert int(gan.d_optimizer.iterations) == int(gan.g_optimizer.iterations) == 100
    assert list(history) == ["d_loss", "g_loss"]
    assert all(np.isfinite(value) and value > 0 for [value] in history.values())
    after = distance()
    assert after < 0.7 * before
    shown(f"{len(steps)} steps; Fréchet distance from {before:.1f} to less than 0.7 of it")  # How much is chance.


class EveryHook(keras.callbacks.Callback):
    """Writes down every call of a hook, with its number and its logs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hook(*args, **kwargs):
            *number, logs = [*args, *kwargs.values()]
            # What callbacks add themselves Keras has forgotten by the end of training.
            logs = {name: value for name, value in (logs or {}).items() if name != "learning_rate"}
            self.calls.append((name, *number, logs))

        return hook


class DefaultStep(hl.Model):
    """The default step, of Handloom."""


class BareLoss(hl.Model):
    """A step that returns its loss as it is."""

    def train_step(self, data):
        x, y = data

        def loss_fn():
            y_pred = self(x, training=True)
            return ops.mean((y_pred - y) ** 2), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        return self.compute_metrics(x, y, y_pred) | {"loss": loss}


def watched_run(base, folder, **options):
    """A run with all kinds of callbacks; returns all that is left of it."""
    x, y = diabetes()
    model = base([keras.Input((10,)), linear()])
    model.compile(keras.optimizers.SGD(RATE, momentum=0.9), loss="mse", metrics=["mae"], **options)
    hooks = EveryHook()
    folder.mkdir()
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=1),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(folder / "best.weights.h5", save_best_only=True, save_weights_only=True),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        hooks,
    ]
    if isinstance(model, hl.Model):  # Keras's own fit has no events.
        callbacks.append(JSONLogger(folder / "events.jsonl"))
    data = {"x": x[:300], "y": y[:300], "validation_data": (x[300:], y[300:])}
    history = model.fit(**data, batch_size=64, epochs=20, shuffle=False, callbacks=callbacks, verbose=0)
    final = model.get_weights()
    model.load_weights(folder / "best.weights.h5")
    return {
        "history": history.history,
        "epochs": history.epoch,
        "hooks": hooks.calls,
        "weights": final,
        "best weights": model.get_weights(),
        "csv": [{name: float(value) for name, value in row.items()} for row in rows_of(folder / "log.csv")],
        "events": values_in(folder) if isinstance(model, hl.Model) else None,
    }


def values_in(folder):
    return [dict(event.values) for event in read_events(folder) if event.kind in ("validation", "epoch")]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_the_same(found, expected):
    """The same names, numbers, and values but for rounding."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_the_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_the_same(one, other)
    elif isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    return watched_run(DefaultStep, tmp_path_factory.mktemp("default") / "run")


@pytest.mark.parametrize("base", [keras.Sequential, OwnStep, BareLoss], ids=["Keras", "own", "bare loss"])
def test_b6_callbacks_lose_nothing_with_an_own_step(base, default_run, tmp_path, shown):
    found = watched_run(base, tmp_path / "run")
    assert 3 < len(found["epochs"]) < 20  # Stopped early.
    for name, expected in default_run.items():
        if found[name] is not None:
            assert_the_same(found[name], expected)
    shown(f"{len(default_run['hooks'])} calls of callbacks, files, weights: the same as by the default step")


def test_b6_steps_asked_to_be_fused_lose_nothing(default_run, tmp_path, shown):
    assert_the_same(watched_run(OwnStep, tmp_path / "run", steps_per_execution=3), default_run)
    shown("the same with three steps in a dispatch asked for")


# 442 patients in batches of 16: windows of 5, then one of 3, the last batch of it smaller.
BATCH, WINDOW = 16, 5


def plain_step(model, optimizer, data, batch_size):
    """Trains by `hl.fit`, with a plain function as the step; returns what is reported."""

    def step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)}

    return hl.fit(step, hl.Feed(data, batch_size=batch_size), epochs=2, verbose=0).history


def models_step(model, optimizer, data, batch_size):
    model.compile(optimizer, loss="mse")
    return model.fit(*data, batch_size=batch_size, epochs=2, shuffle=False, verbose=0).history


@pytest.mark.parametrize("train", [plain_step, models_step])
def test_b7_accumulation_in_an_own_step_equals_the_big_batch_in_numpy(train, eagerly, shown):
    data = diabetes()
    model, optimizer = (
        BareLoss([keras.Input((10,)), linear()]),
        GradientAccumulation(keras.optimizers.SGD(RATE), WINDOW),
    )
    history = train(model, optimizer, data, BATCH)
    errors, weights = regression_by_hand(*data, epochs=2, batch_size=WINDOW * BATCH)
    for found, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history["loss"], (errors**2).mean(axis=1), rtol=1e-4)
    assert int(optimizer.iterations) == 2 * 6
    shown(f"{int(optimizer.iterations) // 2} updates an epoch, the last of a shorter window, as in NumPy")


@pytest.mark.parametrize(
    "inner",
    [lambda: keras.optimizers.SGD(0.02, momentum=0.9), lambda: keras.optimizers.Adam(0.01)],
    ids=["momentum", "Adam"],
)
@pytest.mark.parametrize("train", [plain_step, models_step])
def test_b7_accumulation_in_an_own_step_equals_an_own_step_on_big_batches(train, inner):
    models = []
    for optimizer, batch_size in ((inner(), WINDOW * BATCH), (GradientAccumulation(inner(), WINDOW), BATCH)):
        keras.utils.set_random_seed(0)
        models.append(BareLoss([keras.Input((10,)), layers.Dense(8, "tanh"), layers.Dense(1)]))
        train(models[-1], optimizer, diabetes(), batch_size)
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Pair(hl.Model):
    """Two linear regressions by two optimizers, one after the other in a step."""

    def __init__(self):
        super().__init__()
        self.left, self.right = linear(), linear()

    def train_step(self, data):
        x, y = data
        return {
            "left": self.minimize(lambda: ops.mean((self.left(x) - y) ** 2), wrt=self.left),
            "right": self.minimize(lambda: ops.mean((self.right(x) - y) ** 2), wrt=self.right),
        }


def test_b7_two_optimizers_of_one_step_gather_over_windows_of_their_own(eagerly):
    x, y = diabetes()
    model = Pair()
    sgd = keras.optimizers.SGD
    model.compile({"left": GradientAccumulation(sgd(RATE), 2), "right": GradientAccumulation(sgd(RATE), WINDOW)})
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    for layer, window in ((model.left, 2), (model.right, WINDOW)):
        _, weights = regression_by_hand(x, y, epochs=2, batch_size=window * BATCH)
        for found, expected in zip(layer.get_weights(), weights, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
