"""`tf.GradientTape` in the steps of `hl.Model`, in every manner in which Keras's guides and examples use it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.guides.common import LABELS, X, evaluation_step, mlp, trains_as_keras, updated
from tests.numbers import normal

pytestmark = pytest.mark.backend("tensorflow")

tf = pytest.importorskip("tensorflow")

Adam = keras.optimizers.Adam


class Sampling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(7)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(tf.shape(mean), seed=self.seed)
        return mean + tf.exp(0.5 * log_variance) * noise


def supervised(base):
    class Supervised(base):
        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return updated(self, loss, y, y_pred, sample_weight)

        test_step = evaluation_step

        def predict_step(self, data):
            return self(data, training=False) * 2

    start = keras.Input((4,))
    model = Supervised(start, layers.Dense(1)(layers.Dense(4, kernel_regularizer="l2")(start)))
    model.compile("adam", "mse", metrics=["mae"])
    return model, (X, X[:, :1]), {"validation_data": (X, X[:, :1])}


def weighted(base):
    model, data, _ = supervised(base)
    return model, data, {"sample_weight": np.linspace(0.5, 2, 8)}


def vae(base):
    class VAE(base):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.sampling = mlp(4, 4), mlp(2, 4, name="decoder"), Sampling()
            self.trackers = [keras.metrics.Mean(name=name) for name in ("total", "reconstruction", "kl")]

        @property
        def metrics(self):
            return self.trackers

        def train_step(self, data):
            with tf.GradientTape() as tape:
                mean, log_variance = tf.split(self.encoder(data), 2, axis=1)
                decoded = self.decoder(self.sampling((mean, log_variance)))
                reconstruction = tf.reduce_mean(keras.losses.mean_squared_error(data, decoded))
                kl = -0.5 * tf.reduce_mean(1 + log_variance - tf.square(mean) - tf.exp(log_variance))
                total = reconstruction + kl
            grads = tape.gradient(total, self.trainable_weights)
            self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
            for tracker, value in zip(self.trackers, (total, reconstruction, kl), strict=True):
                tracker.update_state(value)
            return {tracker.name: tracker.result() for tracker in self.trackers}

    model = VAE()
    model.compile(optimizer=Adam(0.01))
    return model, (X,), {}


class Quantizer(layers.Layer):
    """Adds its losses in `call`, and passes gradients straight through."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.codes = self.add_weight(shape=(2, 6), initializer="random_uniform", name="codes")

    def call(self, x):
        distances = tf.reduce_sum(x**2, axis=1, keepdims=True) + tf.reduce_sum(self.codes**2, axis=0)
        nearest = tf.argmin(distances - 2 * tf.matmul(x, self.codes), axis=1)
        quantized = tf.matmul(tf.one_hot(nearest, 6), self.codes, transpose_b=True)
        self.add_loss(0.25 * tf.reduce_mean((tf.stop_gradient(quantized) - x) ** 2))
        self.add_loss(tf.reduce_mean((quantized - tf.stop_gradient(x)) ** 2))
        return x + tf.stop_gradient(quantized - x)


def vq_vae(base):
    class VQVAE(base):
        def __init__(self, variance, **kwargs):
            super().__init__(**kwargs)
            self.variance = variance
            start = keras.Input((4,))
            self.vqvae = keras.Model(start, mlp(2, 4)(Quantizer()(mlp(4, 2)(start))))
            self.total = keras.metrics.Mean(name="total_loss")
            self.vq = keras.metrics.Mean(name="vq_loss")

        @property
        def metrics(self):
            return [self.total, self.vq]

        def train_step(self, x):
            with tf.GradientTape() as tape:
                reconstructions = self.vqvae(x)
                total = tf.reduce_mean((x - reconstructions) ** 2) / self.variance + sum(self.vqvae.losses)
            grads = tape.gradient(total, self.vqvae.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.vqvae.trainable_variables, strict=True))
            self.total.update_state(total)
            self.vq.update_state(sum(self.vqvae.losses))
            return {"loss": self.total.result(), "vqvae_loss": self.vq.result()}

    model = VQVAE(np.var(X))
    model.compile(optimizer=Adam(0.01))
    return model, (X,), {}


def gan(base):
    class GAN(base):
        def __init__(self, discriminator, generator, latent_dim):
            super().__init__()
            self.discriminator, self.generator, self.latent_dim = discriminator, generator, latent_dim
            self.seed_generator = keras.random.SeedGenerator(1)

        def compile(self, d_optimizer, g_optimizer, loss_fn):
            super().compile()
            self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn
            self.d_loss_metric = keras.metrics.Mean(name="d_loss")
            self.g_loss_metric = keras.metrics.Mean(name="g_loss")

        @property
        def metrics(self):
            return [self.d_loss_metric, self.g_loss_metric]

        def noise(self, count):
            return keras.random.normal((count, self.latent_dim), seed=self.seed_generator)

        def train_step(self, data):
            real, classes = data
            size = tf.shape(real)[0]
            classes = tf.one_hot(classes, 3)
            fake = self.generator(tf.concat([self.noise(size), classes], axis=1))
            both = tf.concat([tf.concat([fake, classes], axis=1), tf.concat([real, classes], axis=1)], axis=0)
            labels = tf.concat([tf.ones((size, 1)), tf.zeros((size, 1))], axis=0)
            labels += 0.05 * keras.random.uniform(tf.shape(labels), seed=self.seed_generator)
            with tf.GradientTape() as tape:
                d_loss = self.loss_fn(labels, self.discriminator(both))
            grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
            self.d_optimizer.apply_gradients(zip(grads, self.discriminator.trainable_weights, strict=True))
            latent = tf.concat([self.noise(size), classes], axis=1)
            with tf.GradientTape() as tape:
                predictions = self.discriminator(tf.concat([self.generator(latent), classes], axis=1))
                g_loss = self.loss_fn(tf.zeros((size, 1)), predictions)
            grads = tape.gradient(g_loss, self.generator.trainable_weights)
            self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights, strict=True))
            self.d_loss_metric.update_state(d_loss)
            self.g_loss_metric.update_state(g_loss)
            return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}

    class Monitor(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            latent = keras.random.normal((3, self.model.latent_dim), seed=5)
            images = self.model.generator(tf.concat([latent, tf.one_hot([0, 1, 2], 3)], axis=1))
            assert images.numpy().shape == (3, 4)
            logs["generated"] = float(tf.reduce_mean(images))

    model = GAN(mlp(7, 1), mlp(5, 4, name="generator"), 2)
    model.compile(Adam(0.01), Adam(0.02), keras.losses.BinaryCrossentropy(from_logits=True))
    return model, (X, LABELS), {"callbacks": [Monitor()]}


def wgan_gp(base):
    class WGAN(base):
        def __init__(self):
            super().__init__()
            self.discriminator, self.generator = mlp(4, 1), mlp(2, 4, name="generator")
            self.seed = keras.random.SeedGenerator(1)

        def compile(self, d_optimizer, g_optimizer, d_loss_fn, g_loss_fn):
            super().compile()
            self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
            self.d_loss_fn, self.g_loss_fn = d_loss_fn, g_loss_fn

        def gradient_penalty(self, size, real, fake):
            alpha = keras.random.uniform((size, 1), seed=self.seed)
            interpolated = real + alpha * (fake - real)
            with tf.GradientTape() as tape:
                tape.watch(interpolated)
                pred = self.discriminator(interpolated, training=True)
            norm = tf.sqrt(tf.reduce_sum(tf.square(tape.gradient(pred, [interpolated])[0]), axis=[1]))
            return tf.reduce_mean((norm - 1.0) ** 2)

        def train_step(self, real):
            if isinstance(real, tuple):
                real = real[0]
            size = tf.shape(real)[0]
            for _ in range(2):
                latent = keras.random.normal((size, 2), seed=self.seed)
                with tf.GradientTape() as tape:
                    fake = self.generator(latent, training=True)
                    cost = self.d_loss_fn(self.discriminator(real, training=True), self.discriminator(fake))
                    d_loss = cost + 10.0 * self.gradient_penalty(size, real, fake)
                grads = tape.gradient(d_loss, self.discriminator.trainable_variables)
                self.d_optimizer.apply_gradients(zip(grads, self.discriminator.trainable_variables, strict=True))
            with tf.GradientTape() as tape:
                fake = self.generator(keras.random.normal((size, 2), seed=self.seed), training=True)
                g_loss = self.g_loss_fn(self.discriminator(fake, training=True))
            grads = tape.gradient(g_loss, self.generator.trainable_variables)
            self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_variables, strict=True))
            return {"d_loss": d_loss, "g_loss": g_loss}

    model = WGAN()
    mean = tf.reduce_mean
    model.compile(Adam(0.01), Adam(0.02), lambda real, fake: mean(fake) - mean(real), lambda fake: -mean(fake))
    return model, (X,), {}


def cyclegan(base):
    class CycleGAN(base):
        def __init__(self):
            super().__init__()
            self.gen_g, self.gen_f = mlp(4, 4, name="g"), mlp(4, 4, name="f")
            self.disc_x, self.disc_y = mlp(4, 1, name="x"), mlp(4, 1, name="y")

        def call(self, inputs):
            return self.gen_g(inputs)

        def compile(self, g, f, x, y, gen_loss_fn, disc_loss_fn):
            super().compile()
            self.g_opt, self.f_opt, self.x_opt, self.y_opt = g, f, x, y
            self.generator_loss_fn, self.discriminator_loss_fn = gen_loss_fn, disc_loss_fn
            self.cycle_loss_fn = keras.losses.MeanAbsoluteError()

        def train_step(self, batch_data):
            real_x, real_y = batch_data
            with tf.GradientTape(persistent=True) as tape:
                fake_y, fake_x = self.gen_g(real_x, training=True), self.gen_f(real_y, training=True)
                cycled_x, cycled_y = self.gen_f(fake_y, training=True), self.gen_g(fake_x, training=True)
                disc_fake_x, disc_fake_y = self.disc_x(fake_x, training=True), self.disc_y(fake_y, training=True)
                g_loss = self.generator_loss_fn(disc_fake_y) + 10.0 * self.cycle_loss_fn(real_y, cycled_y)
                f_loss = self.generator_loss_fn(disc_fake_x) + 10.0 * self.cycle_loss_fn(real_x, cycled_x)
                x_loss = self.discriminator_loss_fn(self.disc_x(real_x, training=True), disc_fake_x)
                y_loss = self.discriminator_loss_fn(self.disc_y(real_y, training=True), disc_fake_y)
            losses = {"G_loss": g_loss, "F_loss": f_loss, "D_X_loss": x_loss, "D_Y_loss": y_loss}
            parts = (self.gen_g, self.gen_f, self.disc_x, self.disc_y)
            gradients = [
                tape.gradient(loss, part.trainable_variables) for loss, part in zip(losses.values(), parts, strict=True)
            ]
            optimizers = (self.g_opt, self.f_opt, self.x_opt, self.y_opt)
            for optimizer, grads, part in zip(optimizers, gradients, parts, strict=True):
                optimizer.apply_gradients(zip(grads, part.trainable_variables, strict=True))
            return losses

    mse = keras.losses.MeanSquaredError()
    model = CycleGAN()
    model.compile(
        *(Adam(0.002, beta_1=0.5) for _ in range(4)),
        gen_loss_fn=lambda fake: mse(tf.ones_like(fake), fake),
        disc_loss_fn=lambda real, fake: (mse(tf.ones_like(real), real) + mse(tf.zeros_like(fake), fake)) * 0.5,
    )
    pairs = tf.data.Dataset.zip((tf.data.Dataset.from_tensor_slices(X), tf.data.Dataset.from_tensor_slices(-X)))
    return model, (pairs.batch(8),), {}


class Generates:
    def generate(self, count, steps):
        following = keras.random.normal((count, 4), seed=2)
        for step in range(steps):
            angles = 1.2 * (tf.ones((count, 1)) - step / steps)
            noises, images = self.denoise(following, tf.sin(angles), tf.cos(angles), training=False)
            angles -= 1.2 / steps
            following = tf.cos(angles) * images + tf.sin(angles) * noises
        return self.normalizer.mean + images * self.normalizer.variance**0.5

    def plot_images(self, epoch=None, logs=None):
        logs["generated"] = self.generate(2, 2).numpy().mean()


def diffusion(base):
    class Diffusion(Generates, base):
        def __init__(self):
            super().__init__()
            self.normalizer = layers.Normalization()
            start, rates = keras.Input((4,)), keras.Input((1,))
            inner = layers.BatchNormalization(center=False, scale=False)(layers.Concatenate()([start, rates]))
            self.network = keras.Model([start, rates], layers.Dense(4)(layers.Dense(6, activation="swish")(inner)))
            self.ema_network = keras.models.clone_model(self.network)
            self.seed = keras.random.SeedGenerator(1)

        def compile(self, **kwargs):
            super().compile(**kwargs)
            self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")
            self.image_loss_tracker = keras.metrics.Mean(name="i_loss")

        @property
        def metrics(self):
            return [self.noise_loss_tracker, self.image_loss_tracker]

        def denoise(self, noisy, noise_rates, signal_rates, training):
            network = self.network if training else self.ema_network
            noises = network([noisy, noise_rates**2], training=training)
            return noises, (noisy - noise_rates * noises) / signal_rates

        def losses_of(self, images, training):
            noises = keras.random.normal((8, 4), seed=self.seed)
            angles = 0.3 + keras.random.uniform((8, 1), seed=self.seed)
            noise_rates, signal_rates = tf.sin(angles), tf.cos(angles)
            noisy = signal_rates * images + noise_rates * noises
            pred_noises, pred_images = self.denoise(noisy, noise_rates, signal_rates, training=training)
            return self.loss(noises, pred_noises), self.loss(images, pred_images)

        def train_step(self, images):
            images = self.normalizer(images, training=True)
            with tf.GradientTape() as tape:
                noise_loss, image_loss = self.losses_of(images, training=True)
            gradients = tape.gradient(noise_loss, self.network.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights, strict=True))
            self.noise_loss_tracker.update_state(noise_loss)
            self.image_loss_tracker.update_state(image_loss)
            for weight, ema_weight in zip(self.network.weights, self.ema_network.weights, strict=True):
                ema_weight.assign(0.9 * ema_weight + 0.1 * weight)
            return {metric.name: metric.result() for metric in self.metrics}

        def test_step(self, images):
            noise_loss, image_loss = self.losses_of(self.normalizer(images, training=False), training=False)
            self.noise_loss_tracker.update_state(noise_loss)
            self.image_loss_tracker.update_state(image_loss)
            return {metric.name: metric.result() for metric in self.metrics}

    model = Diffusion()
    model.normalizer.adapt(X)
    model.compile(optimizer=keras.optimizers.AdamW(0.01, weight_decay=1e-4), loss=keras.losses.mean_absolute_error)
    data = tf.data.Dataset.from_tensor_slices(X).batch(8, drop_remainder=True)
    return model, (data,), {"callbacks": [keras.callbacks.LambdaCallback(on_epoch_end=model.plot_images)]}


def contrastive(base):
    class NearestNeighbours(base):
        """A queue of features, two optimizers, labeled and unlabeled data zipped, metrics not listed anywhere."""

        def __init__(self):
            super().__init__()
            self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy(name="p_acc")
            self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy(name="c_acc")
            self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            self.augmenter = keras.Sequential([layers.GaussianNoise(0.1, seed=1)])
            self.encoder, self.linear_probe = mlp(4, 3, name="encoder"), keras.Sequential([layers.Dense(3)])
            queue = keras.utils.normalize(normal(16, 3), axis=1, order=2)
            self.queue = keras.Variable(queue, trainable=False)

        def compile(self, contrastive_optimizer, probe_optimizer, **kwargs):
            super().compile(**kwargs)
            self.contrastive_optimizer, self.probe_optimizer = contrastive_optimizer, probe_optimizer

        def nearest(self, projections):
            similarities = ops.matmul(projections, ops.transpose(self.queue))
            found = ops.take(self.queue, ops.argmax(similarities, axis=1), axis=0)
            return projections + ops.stop_gradient(found - projections)

        def contrastive_loss(self, first, second):
            first, second = (ops.normalize(each, axis=1) for each in (first, second))
            logits = ops.matmul(self.nearest(first), ops.transpose(second)) / 0.1
            labels = ops.arange(ops.shape(first)[0])
            self.contrastive_accuracy.update_state(labels, logits)
            self.queue.assign(ops.concatenate([first, self.queue[: -ops.shape(first)[0]]], axis=0))
            return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)

        def train_step(self, data):
            (unlabeled, _), (labeled, labels) = data
            images = ops.concatenate((unlabeled, labeled), axis=0)
            with tf.GradientTape() as tape:
                first, second = (self.encoder(self.augmenter(images, training=True)) for _ in range(2))
                loss = self.contrastive_loss(first, second)
            gradients = tape.gradient(loss, self.encoder.trainable_weights)
            self.contrastive_optimizer.apply_gradients(zip(gradients, self.encoder.trainable_weights, strict=True))
            with tf.GradientTape() as tape:
                logits = self.linear_probe(self.encoder(labeled))
                probe_loss = self.probe_loss(labels, logits)
            gradients = tape.gradient(probe_loss, self.linear_probe.trainable_weights)
            self.probe_optimizer.apply_gradients(zip(gradients, self.linear_probe.trainable_weights, strict=True))
            self.probe_accuracy.update_state(labels, logits)
            return {
                "c_loss": ops.mean(loss),
                "c_acc": self.contrastive_accuracy.result(),
                "p_loss": probe_loss,
                "p_acc": self.probe_accuracy.result(),
            }

    model = NearestNeighbours()
    model.compile(contrastive_optimizer=Adam(0.01), probe_optimizer=Adam(0.01), jit_compile=False)
    dataset = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(4)
    return model, (tf.data.Dataset.zip((dataset.take(1), dataset.skip(1))),), {}


def distillation(base):
    class Distiller(base):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.teacher = student, teacher

        def compile(self, optimizer, metrics, student_loss_fn, distillation_loss_fn, alpha=0.1, temperature=3):
            super().compile(optimizer=optimizer, metrics=metrics)
            self.student_loss_fn, self.distillation_loss_fn = student_loss_fn, distillation_loss_fn
            self.alpha, self.temperature = alpha, temperature

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False, training=True):
            soft = [ops.softmax(logits / self.temperature, axis=1) for logits in (self.teacher(x), y_pred)]
            distillation_loss = self.distillation_loss_fn(*soft) * self.temperature**2
            return self.alpha * self.student_loss_fn(y, y_pred) + (1 - self.alpha) * distillation_loss

        def call(self, x):
            return self.student(x)

    teacher = mlp(4, 3, hidden=9, name="teacher")
    teacher.trainable = False
    model = Distiller(mlp(4, 3, name="student"), teacher)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        Adam(0.01), [keras.metrics.SparseCategoricalAccuracy()], cross_entropy, keras.losses.KLDivergence(), alpha=0.2
    )
    return model, (X, LABELS), {"validation_data": (X, LABELS)}


def semi_supervised(base):
    class Match(base):
        """Strong and weak views, pseudo labels, a mask, and a counter that is a tf.Variable."""

        def __init__(self, model):
            super().__init__()
            self.model = model
            self.loss_tracker = keras.metrics.Mean(name="loss")
            self.current_step = tf.Variable(0, dtype="int64", trainable=False)

        @property
        def kept(self):
            return [self.current_step]

        @property
        def metrics(self):
            return [self.loss_tracker]

        def train_step(self, data):
            (source_w, source_labels), (source_s, _) = data[0]
            (target_w, _), (target_s, _) = data[1]
            combined = tf.concat([source_w, source_s, target_w, target_s], 0)
            count = tf.shape(tf.concat([source_w, source_s], 0))[0]
            with tf.GradientTape() as tape:
                logits = self.model(combined, training=True)
                source, target = logits[:count], logits[count:]
                pseudo = tf.stop_gradient(tf.nn.softmax(target[: tf.shape(target_w)[0]]))
                mask = tf.cast(tf.reduce_max(pseudo, axis=-1) >= 0.34, "float32")
                none = keras.losses.CategoricalCrossentropy(from_logits=True, reduction="none")
                target_loss = tf.reduce_mean(none(pseudo, target[tf.shape(target_w)[0] :]) * mask, 0)
                mean = keras.losses.CategoricalCrossentropy(from_logits=True)
                source_loss = mean(source_labels, source[: tf.shape(source_w)[0]])
                step = tf.cast(self.current_step, dtype="float32")
                total = source_loss + (0.5 - tf.cos(tf.math.minimum(np.pi, step)) / 2) * target_loss
                self.current_step.assign_add(1)
            gradients = tape.gradient(total, self.model.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
            self.loss_tracker.update_state(total)
            return {"loss": self.loss_tracker.result()}

    start = keras.Input((4,))
    inner = layers.Dense(3)(layers.BatchNormalization()(start))
    model = Match(keras.Model(start, inner))
    model.compile(keras.optimizers.SGD(0.1))
    one_hot = np.eye(3, dtype="float32")[LABELS]
    views = [tf.data.Dataset.from_tensor_slices((scale * X, one_hot)).batch(8) for scale in (1.0, 1.1, -1.0, -1.1)]
    zipped = tf.data.Dataset.zip((tf.data.Dataset.zip(tuple(views[:2])), tf.data.Dataset.zip(tuple(views[2:]))))
    return model, (zipped,), {}


def accumulation_by_hand(base):
    class Accumulating(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.count = tf.constant(2, dtype=tf.int32)
            self.step = tf.Variable(0, dtype=tf.int32, trainable=False)
            self.sums = [tf.Variable(tf.zeros_like(v), trainable=False) for v in self.trainable_variables]

        @property
        def kept(self):
            return [self.step, *self.sums]

        def train_step(self, data):
            self.step.assign_add(1)
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            for total, gradient in zip(self.sums, gradients, strict=True):
                total.assign_add(gradient)
            tf.cond(tf.equal(self.step, self.count), self.apply_sums, lambda: None)
            return {"batch_loss": loss}

        def apply_sums(self):
            self.optimizer.apply_gradients(zip(self.sums, self.trainable_variables, strict=True))
            self.step.assign(0)
            for total in self.sums:
                total.assign(tf.zeros_like(total))

    start = keras.Input((4,))
    model = Accumulating(start, layers.Dense(1)(start))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, (X, X[:, :1]), {}


def masked_autoencoder(base):
    class PatchEncoder(layers.Layer):
        """Layers made in `build`, a mask token, and a draw of patches in `call`."""

        def build(self, input_shape):
            (_, self.num_patches, _) = input_shape
            self.mask_token = self.add_weight(shape=(1, 2), initializer="random_normal", name="mask_token")
            self.projection = layers.Dense(3)
            self.position_embedding = layers.Embedding(self.num_patches, 3)
            self.seed = keras.random.SeedGenerator(3)

        def call(self, patches):
            size = tf.shape(patches)[0]
            positions = self.position_embedding(tf.range(self.num_patches)[tf.newaxis, ...])
            positions = tf.tile(positions, [size, 1, 1])
            order = tf.argsort(keras.random.uniform((size, self.num_patches), seed=self.seed), axis=-1)
            masked, kept = order[:, :1], order[:, 1:]
            embedded = self.projection(patches) + positions
            tokens = self.projection(tf.repeat(self.mask_token[tf.newaxis], repeats=size, axis=0))
            return (
                tf.gather(embedded, kept, axis=1, batch_dims=1),
                tokens + tf.gather(positions, masked, axis=1, batch_dims=1),
                masked,
            )

    class Autoencoder(base):
        def __init__(self):
            super().__init__()
            self.patches, self.patch_encoder = layers.Reshape((2, 2)), PatchEncoder()
            self.decoder = keras.Sequential([layers.Flatten(), layers.Dense(4), layers.Reshape((2, 2))])

        def calculate_loss(self, images):
            patches = self.patches(images)
            kept, hidden, masked = self.patch_encoder(patches)
            decoded = self.decoder(tf.concat([kept, hidden], axis=1))
            expected = tf.gather(patches, masked, axis=1, batch_dims=1)
            output = tf.gather(decoded, masked, axis=1, batch_dims=1)
            return self.compute_loss(y=expected, y_pred=output), expected, output

        def train_step(self, images):
            with tf.GradientTape() as tape:
                loss, expected, output = self.calculate_loss(images)
            parts = [*self.patch_encoder.trainable_variables, *self.decoder.trainable_variables]
            pairs = [(g, v) for g, v in zip(tape.gradient(loss, parts), parts, strict=True) if g is not None]
            self.optimizer.apply_gradients(pairs)
            results = {}
            for metric in self.metrics:
                metric.update_state(*((loss,) if metric.name == "loss" else (expected, output)))
                results[metric.name] = metric.result()
            return results

    model = Autoencoder()
    model.patch_encoder(model.patches(X))
    model.compile(optimizer=Adam(0.01), loss=keras.losses.MeanSquaredError(), metrics=["mae"])
    return model, (X,), {}


def siamese(base):
    class Distance(layers.Layer):
        def call(self, anchor, positive, negative):
            near = ops.sum(tf.square(anchor - positive), -1)
            return near, ops.sum(tf.square(anchor - negative), -1)

    class Siamese(base):
        def __init__(self, siamese_network, margin=0.5):
            super().__init__()
            self.siamese_network, self.margin = siamese_network, margin
            self.loss_tracker = keras.metrics.Mean(name="loss")

        def call(self, inputs):
            return self.siamese_network(inputs)

        def triplet_loss(self, data):
            near, far = self.siamese_network(data)
            return tf.maximum(near - far + self.margin, 0.0)

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = self.triplet_loss(data)
            gradients = tape.gradient(loss, self.siamese_network.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.siamese_network.trainable_weights, strict=True))
            self.loss_tracker.update_state(loss)
            return {"loss": self.loss_tracker.result()}

        def test_step(self, data):
            self.loss_tracker.update_state(self.triplet_loss(data))
            return {"loss": self.loss_tracker.result()}

        @property
        def metrics(self):
            return [self.loss_tracker]

    embedding = mlp(4, 2, name="embedding")
    inputs = [keras.Input((4,), name=name) for name in ("anchor", "positive", "negative")]
    model = Siamese(keras.Model(inputs, Distance()(*map(embedding, inputs))))
    model.compile(optimizer=Adam(0.01), weighted_metrics=[])
    triplets = tf.data.Dataset.from_tensor_slices((X, X + 0.1, -X)).batch(8)
    return model, (triplets,), {"validation_data": triplets}


def forward_forward(base):
    class Local(layers.Layer):
        """Has an optimizer of its own, and updates within a call of the step."""

        def __init__(self, units, optimizer, loss_metric):
            super().__init__()
            self.dense, self.optimizer, self.loss_metric = layers.Dense(units), optimizer, loss_metric

        def call(self, x):
            return tf.nn.relu(self.dense(x / (tf.norm(x, axis=1, keepdims=True) + 1e-4)))

        def train(self, positive, negative):
            for _ in range(2):
                with tf.GradientTape() as tape:
                    goods = [tf.reduce_mean(self.call(x) ** 2, 1) for x in (positive, negative)]
                    loss = tf.reduce_mean(tf.math.log(1 + tf.exp(tf.concat([1.5 - goods[0], goods[1] - 1.5], 0))))
                    self.loss_metric.update_state([loss])
                gradients = tape.gradient(loss, self.dense.trainable_weights)
                self.optimizer.apply_gradients(zip(gradients, self.dense.trainable_weights, strict=True))
            outputs = (tf.stop_gradient(self.call(x)) for x in (positive, negative))
            return *outputs, self.loss_metric.result()

    class Network(base):
        def __init__(self):
            super().__init__()
            self.layer_list = [Local(units, Adam(0.03), keras.metrics.Mean()) for units in (5, 3)]

        @tf.function(jit_compile=True)
        def train_step(self, data):
            x, y = data
            positive, negative = (tf.concat([x, tf.one_hot(labels, 3)], 1) for labels in (y, (y + 1) % 3))
            total = 0.0
            for layer in self.layer_list:
                positive, negative, loss = layer.train(positive, negative)
                total += loss
            return {"FinalLoss": total}

    model = Network()
    model.compile(jit_compile=True)
    return model, (X, LABELS), {}


def captions(base):
    class Captions(base):
        """Several updates in one step, a loss without reduction that is masked by hand, a sum of losses reported."""

        def __init__(self):
            super().__init__()
            self.encoder, self.embedding, self.head = mlp(4, 3), layers.Embedding(5, 3), layers.Dense(5)
            self.loss_tracker = keras.metrics.Mean(name="loss")
            self.acc_tracker = keras.metrics.Mean(name="acc")

        @property
        def metrics(self):
            return [self.loss_tracker, self.acc_tracker]

        def loss_and_accuracy(self, images, tokens, mask):
            pred = self.head(self.embedding(tokens[:, :-1]) + self.encoder(images, training=True)[:, tf.newaxis])
            loss = self.loss(tokens[:, 1:], pred)
            mask = tf.cast(mask, dtype=loss.dtype)
            hits = tf.cast(tf.equal(tokens[:, 1:], tf.argmax(pred, axis=2, output_type="int32")), "float32")
            return tf.reduce_sum(loss * mask) / tf.reduce_sum(mask), tf.reduce_sum(hits * mask) / tf.reduce_sum(mask)

        def train_step(self, batch_data):
            images, sequences = batch_data
            batch_loss = batch_acc = 0
            for i in range(2):
                with tf.GradientTape() as tape:
                    mask = tf.math.not_equal(sequences[:, i, 1:], 0)
                    loss, accuracy = self.loss_and_accuracy(images, sequences[:, i], mask)
                    batch_loss += loss
                    batch_acc += accuracy
                train_vars = self.encoder.trainable_variables + self.embedding.trainable_variables
                grads = tape.gradient(loss, train_vars + self.head.trainable_variables)
                train_vars += self.head.trainable_variables
                self.optimizer.apply_gradients(zip(grads, train_vars, strict=True))
            self.loss_tracker.update_state(batch_loss)
            self.acc_tracker.update_state(batch_acc / 2.0)
            return {"loss": self.loss_tracker.result(), "acc": self.acc_tracker.result()}

    model = Captions()
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    model.compile(optimizer=Adam(0.01), loss=cross_entropy)
    sequences = np.random.default_rng(0).integers(0, 5, (8, 2, 4)).astype("int32")
    sequences[:, :, 1] = 1
    return model, (tf.data.Dataset.from_tensor_slices((X, sequences)).batch(8),), {}


def frozen_in_turn(base):
    class Combined(base):
        """The discriminator inside the combined model is frozen and unfrozen within the step."""

        def __init__(self):
            super().__init__()
            self.discriminator, self.generator = mlp(4, 1, name="discriminator"), mlp(4, 4, name="generator")
            self.discriminator.trainable = False
            start = keras.Input((4,))
            self.combined = keras.Model(start, self.discriminator(self.generator(start)))

        def compile(self, gen_lr=1e-2, disc_lr=4e-2, **kwargs):
            super().compile(**kwargs)
            self.g_opt, self.d_opt = Adam(gen_lr), Adam(disc_lr)

        def train_step(self, real):
            fake = self.generator(real)
            self.discriminator.trainable = True
            with tf.GradientTape() as tape:
                d_loss = tf.reduce_mean(self.discriminator(fake) ** 2 + (self.discriminator(real) - 1) ** 2)
            gradients = tape.gradient(d_loss, self.discriminator.trainable_variables)
            self.d_opt.apply_gradients(zip(gradients, self.discriminator.trainable_variables, strict=True))
            self.discriminator.trainable = False
            with tf.GradientTape() as tape:
                g_loss = tf.reduce_mean((self.combined(real) - 1) ** 2)
            gradients = tape.gradient(g_loss, self.combined.trainable_variables)
            self.g_opt.apply_gradients(zip(gradients, self.combined.trainable_variables, strict=True))
            return {"d_loss": d_loss, "g_loss": g_loss}

    model = Combined()
    model.compile()
    return model, (X,), {}


def twins(base):
    class Twins(base):
        """A target network that follows by a moving average, predictors, and `train_step` through `super()`."""

        def __init__(self):
            super().__init__()
            self.online, self.target, self.predictor = mlp(4, 3), mlp(4, 3, name="target"), layers.Dense(3)
            self.target.trainable = False

        def call(self, views):
            return self.predictor(self.online(views[:, 0])), tf.stop_gradient(self.target(views[:, 1]))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            first, second = (tf.math.l2_normalize(part, axis=1) for part in y_pred)
            return -tf.reduce_mean(tf.reduce_sum(first * second, axis=1))

        def train_step(self, data):
            results = super().train_step(data)
            for own, other in zip(self.target.weights, self.online.weights, strict=True):
                own.assign(0.9 * own + 0.1 * other)
            return results

    model = Twins()
    model.compile(Adam(0.01))
    return model, (np.stack([X, X + 0.1], axis=1),), {}


def call_through_super(base):
    class Encoded(base):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(3, kernel_regularizer="l2", activity_regularizer="l2")

        def call(self, x):
            return self.inner(x)

    class Doubled(Encoded):
        """Adds a loss of its own, tracks a metric in `call`, and draws from a generator of its own."""

        def __init__(self):
            super().__init__()
            self.seed, self.size = keras.random.SeedGenerator(1), keras.metrics.Mean(name="size")

        def call(self, x, training=False):
            outputs = super().call(x)
            self.add_loss(0.1 * tf.reduce_mean(outputs**2))
            self.size.update_state(tf.reduce_mean(tf.abs(outputs)))
            return outputs + keras.random.normal(tf.shape(outputs), 0, 0.1, seed=self.seed) if training else outputs

    model = Doubled()
    model(X)
    model.compile(Adam(0.01), "mse", metrics=["mae"])
    return model, (X, X[:, :3]), {"validation_data": (X, X[:, :3])}


MODELS = [
    call_through_super,
    supervised,
    weighted,
    vae,
    vq_vae,
    gan,
    wgan_gp,
    cyclegan,
    diffusion,
    contrastive,
    distillation,
    semi_supervised,
    accumulation_by_hand,
    masked_autoencoder,
    siamese,
    forward_forward,
    captions,
    frozen_in_turn,
    twins,
]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_model_with_gradient_tapes_trains_as_in_keras(make):
    # Some take over 10 s: each is compiled twice, by Keras and by Handloom, `forward_forward` by XLA.
    trains_as_keras(make)
