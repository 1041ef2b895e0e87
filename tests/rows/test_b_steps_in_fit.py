"""Rows B: custom steps inside `fit`."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.callbacks import JSONLogger
from handloom.optimizers import GradientAccumulation
from handloom.report import frechet_distance, read_events
from tests.models import KINDS, compiled, fit, functional, sequential
from tests.numbers import close, each_close
from tests.rows.by_numpy import linear_regression
from tests.rows.real_data import diabetes, digits

RATE = 0.1


def linear():
    return layers.Dense(1, kernel_initializer="zeros")


class CustomStep(hl.Model):
    """The training step of Keras's guide, with `compute_loss` and the compiled metrics."""

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


@pytest.mark.parametrize("kind", KINDS)
def test_b1_fit_with_compute_loss_and_the_compiled_metrics_trains_as_numpy_does(kind, shown):
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, size=(1000, 32)).astype("float32")
    y = (x @ random.normal(size=(32, 1)) + random.normal(size=(1000, 1))).astype("float32")
    steps, model = [], compiled(KINDS[kind](linear(), inputs=32, cls=CustomStep), metrics=["mae"])
    counting = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    history = fit(model, x, y, epochs=2, callbacks=[counting])
    errors, weights = linear_regression((x, y), epochs=2)
    assert steps == [*range(32), *range(32)]
    assert int(model.optimizer.iterations) == 2 * 32
    close(history["loss"], (errors**2).mean(axis=1), rtol=1e-4)
    close(history["mae"], np.abs(errors).mean(axis=1), rtol=1e-4)
    each_close(model.get_weights(), weights, rtol=1e-3, atol=1e-5)
    shown(f"{len(steps) // 2} steps an epoch; loss {history['loss'][-1]:.3f}, mae {history['mae'][-1]:.3f} as in NumPy")


class CustomTrackers(hl.Model):
    """A custom loss, and custom metrics in `metrics`."""

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


def test_b2_fit_resets_custom_trackers_each_epoch(eagerly, shown):
    model = functional(linear(), inputs=10, cls=CustomTrackers)
    model.compile(optimizer=keras.optimizers.SGD(RATE))
    history = fit(model, *diabetes(), batch_size=128, epochs=3)
    errors, _ = linear_regression(diabetes(), epochs=3, batch_size=128)
    close(history["loss"], (errors**2).mean(axis=1), rtol=1e-4)
    close(history["mae"], np.abs(errors).mean(axis=1), rtol=1e-4)
    never_reset = (errors**2).mean()
    assert history["loss"][-1] < 0.95 * never_reset  # The wrong mean would show.
    shown(f"loss {history['loss'][-1]:.3f}; without a reset it would be {never_reset:.3f}")


class WeightedStep(hl.Model):
    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_fn():
            y_pred = self(x, training=True)
            return self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        return self.compute_metrics(x, y, y_pred, sample_weight) | {"loss": loss}


@pytest.mark.parametrize("kind", ["sample_weight", "class_weight"])
def test_b3_fit_with_weights_in_a_custom_step_trains_as_numpy_does(kind, eagerly, shown):
    pixels, labels = (array[:200] for array in digits())
    y, of_class = (labels == 8).astype("float32")[:, None], {0: 0.5, 1: 4.0}
    weight = np.where(y[:, 0] == 1, of_class[1], of_class[0])
    model = compiled(sequential(linear(), inputs=64, cls=WeightedStep), metrics=["mae"], weighted_metrics=["mse"])
    history = fit(model, pixels, y, **{kind: weight if kind == "sample_weight" else of_class})
    [errors], weights = linear_regression((pixels, y, weight))
    each_close(model.get_weights(), weights, rtol=1e-3, atol=1e-5)
    close(history["loss"], [np.mean(weight * errors**2)], rtol=1e-4)
    close(history["mse"], [np.average(errors**2, weights=weight)], rtol=1e-4)
    close(history["mae"], [np.abs(errors).mean()], rtol=1e-4)  # Not a weighted metric.
    shown(f"{kind}: loss {history['loss'][0]:.3f} as in NumPy")


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": None}], ids=["not given", "None"])
def test_b4_evaluate_runs_a_custom_test_step_without_an_optimizer_as_keras_does(optimizer, eagerly, shown):
    (x, y), random = diabetes(), np.random.default_rng(0)
    weights = [random.normal(size=(10, 1)), random.normal(size=1)]
    results = []
    for cls in (CustomStep, keras.Sequential):
        model = sequential(inputs=10, cls=cls)
        model.set_weights(weights)
        model.compile(**optimizer, loss="mse", metrics=["mae"])
        results.append(model.evaluate(x, y, verbose=0))
        results.append(list(model.evaluate(x, y, verbose=0, return_dict=True).values()))
    off = x @ weights[0] + weights[1] - y
    close(results, 4 * [[(off**2).mean(), np.abs(off).mean()]], rtol=1e-4)
    shown(f"loss {results[0][0]:.3f}, mae {results[0][1]:.3f}, as Keras")


LATENT = 16


class GAN(hl.Model):
    """The GAN of Keras's guide, with noisy labels."""

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
    discriminator = [
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, strides=2, padding="same"),
        layers.LeakyReLU(negative_slope=0.2),
        layers.Flatten(),
        layers.Dense(1),
    ]
    generator = [
        keras.Input((LATENT,)),
        layers.Dense(4 * 4 * 16, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.LeakyReLU(negative_slope=0.2),
        layers.Reshape((4, 4, 16)),
        layers.Conv2DTranspose(16, 4, strides=2, padding="same"),
        layers.LeakyReLU(negative_slope=0.2),
        layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
    ]
    return GAN(keras.Sequential(discriminator), keras.Sequential(generator))


def test_b5_fit_trains_a_gan_with_a_custom_compile_to_draw_more_like_the_data(shown):
    tf = pytest.importorskip("tensorflow")  # For its datasets, which every backend reads.

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
    assert distance() < 0.7 * before
    # The exact distance after training is a matter of chance.
    shown(f"{len(steps)} steps; Fréchet distance from {before:.1f} to less than 0.7 of it")


class EveryHook(keras.callbacks.Callback):
    """Records every call of a hook, with its number and its logs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hook(*args, **kwargs):
            *number, logs = [*args, *kwargs.values()]
            # Keras forgets by the end of training what the callbacks themselves have added.
            logs = {name: value for name, value in (logs or {}).items() if name != "learning_rate"}
            self.calls.append((name, *number, logs))

        return hook


def watched_run(cls, folder, **options):
    """A run with all kinds of callbacks; returns all that it leaves behind."""
    x, y = diabetes()
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    model = compiled(sequential(linear(), inputs=10, cls=cls), optimizer, metrics=["mae"], **options)
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
    if isinstance(model, hl.Model):  # The `fit` of Keras has no events.
        callbacks.append(JSONLogger(folder / "events.jsonl"))
    data = {"x": x[:300], "y": y[:300], "validation_data": (x[300:], y[300:])}
    history = fit(model, **data, batch_size=64, epochs=20, callbacks=callbacks)
    final = model.get_weights()
    model.load_weights(folder / "best.weights.h5")
    found = {"history": history, "hooks": hooks.calls, "weights": final, "best weights": model.get_weights()}
    found["csv"] = np.genfromtxt(folder / "log.csv", delimiter=",", names=True).tolist()
    if isinstance(model, hl.Model):
        events = read_events(folder)
        found["events"] = [dict(event.values) for event in events if event.kind in ("validation", "epoch")]
    return found


def assert_same(found, expected):
    """Compares names in their order, and values up to rounding."""
    if isinstance(expected, dict):
        found, expected = list(found.items()), list(expected.items())
    if isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, str):
        assert found == expected
    else:
        close(found, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    return watched_run(hl.Sequential, tmp_path_factory.mktemp("default") / "run")


@pytest.mark.parametrize("cls", [keras.Sequential, CustomStep, WeightedStep])
def test_b6_fit_with_a_custom_step_gives_callbacks_all_that_the_default_step_gives(cls, default_run, tmp_path, shown):
    found = watched_run(cls, tmp_path / "run")
    assert 3 < len(found["history"]["loss"]) < 20  # Stopped early.
    assert_same(found, {name: default_run[name] for name in found})
    shown(f"{len(default_run['hooks'])} calls of callbacks, files, weights: the same as with the default step")


def test_b6_fit_with_steps_per_execution_and_a_custom_step_loses_nothing(default_run, tmp_path, shown):
    assert_same(watched_run(CustomStep, tmp_path / "run", steps_per_execution=3), default_run)
    shown("the same with steps_per_execution=3")


# 442 patients in batches of 16: windows of 5, then one of 3, the last batch of it smaller.
BATCH, WINDOW = 16, 5


def plain_step(model, optimizer):
    """Trains with `hl.fit` and a plain function as the step; returns the history."""

    def step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x, training=True) - y) ** 2), model, optimizer)}

    return hl.fit(step, hl.Feed(diabetes(), batch_size=BATCH), epochs=2, verbose=0).history


def step_of_model(model, optimizer):
    return fit(compiled(model, optimizer), *diabetes(), batch_size=BATCH, epochs=2)


@pytest.mark.parametrize("train", [plain_step, step_of_model])
def test_b7_gradient_accumulation_in_a_custom_step_equals_the_big_batch_in_numpy(train, eagerly, shown):
    model = sequential(linear(), inputs=10, cls=WeightedStep)
    optimizer = GradientAccumulation(keras.optimizers.SGD(RATE), WINDOW)
    history = train(model, optimizer)
    errors, weights = linear_regression(diabetes(), epochs=2, batch_size=WINDOW * BATCH)
    each_close(model.get_weights(), weights, rtol=1e-4)
    close(history["loss"], (errors**2).mean(axis=1), rtol=1e-4)
    assert int(optimizer.iterations) == 2 * 6
    shown(f"{int(optimizer.iterations) // 2} updates an epoch, the last of a shorter window, as in NumPy")


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


def test_b7_gradient_accumulation_of_two_optimizers_has_two_windows(eagerly):
    model, windows = Pair(), {"left": 2, "right": WINDOW}
    model.compile({name: GradientAccumulation(keras.optimizers.SGD(RATE), steps) for name, steps in windows.items()})
    fit(model, *diabetes(), batch_size=BATCH, epochs=2)
    for name, window in windows.items():
        _, weights = linear_regression(diabetes(), epochs=2, batch_size=window * BATCH)
        each_close(getattr(model, name).get_weights(), weights, rtol=1e-4)
