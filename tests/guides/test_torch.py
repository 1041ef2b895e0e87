"""`loss.backward()` in the steps of `hl.Model`, in every manner in which Keras's guides use it."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.guides.common import LABELS, X, evaluation_step, mlp, trains_as_keras, updated

pytestmark = pytest.mark.backend("torch")

torch = pytest.importorskip("torch")

Adam = keras.optimizers.Adam


def update(optimizer, loss, variables):
    loss.backward()
    gradients = [variable.value.grad for variable in variables]
    with torch.no_grad():
        optimizer.apply(gradients, variables)


def supervised(base):
    class Supervised(base):
        def train_step(self, data):
            x, y, sample_weight = data if len(data) == 3 else (*data, None)
            self.zero_grad()
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
            loss.backward()
            trainable_weights = list(self.trainable_weights)
            gradients = [weight.value.grad for weight in trainable_weights]
            with torch.no_grad():
                self.optimizer.apply(gradients, trainable_weights)
            return updated(self, loss, y, y_pred, sample_weight)

        test_step = evaluation_step

        def predict_step(self, data):
            return 2 * self(data, training=False)

    start = keras.Input((4,))
    inner = layers.BatchNormalization()(layers.Dense(4, use_bias=False, kernel_regularizer="l2")(start))
    model = Supervised(start, layers.Dense(1)(layers.Dropout(0.2, seed=1)(inner)))
    model.compile("adam", "mse", metrics=["mae"])
    return model, (X, X[:, :1]), {"validation_data": (X, X[:, :1])}


def weighted(base):
    model, data, _ = supervised(base)
    return model, data, {"sample_weight": np.linspace(0.5, 2, 8, dtype="float32")}


def gan(base):
    class GAN(base):
        def __init__(self, discriminator, generator, latent_dim):
            super().__init__()
            self.discriminator, self.generator, self.latent_dim = discriminator, generator, latent_dim
            self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
            self.g_loss_tracker = keras.metrics.Mean(name="g_loss")
            self.seed_generator = keras.random.SeedGenerator(1)
            self.built = True

        @property
        def metrics(self):
            return [self.d_loss_tracker, self.g_loss_tracker]

        def compile(self, d_optimizer, g_optimizer, loss_fn):
            super().compile()
            self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

        def train_step(self, real):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if isinstance(real, (tuple, list)):
                real = real[0]
            size = real.shape[0]
            latent = keras.random.normal(shape=(size, self.latent_dim), seed=self.seed_generator)
            generated = self.generator(latent)
            both = torch.concat([generated, torch.as_tensor(real, device=device)], axis=0)
            ends = [torch.ones((size, 1), device=device), torch.zeros((size, 1), device=device)]
            labels = torch.concat(ends, axis=0)
            labels += 0.05 * keras.random.uniform(labels.shape, seed=self.seed_generator)
            self.zero_grad()
            d_loss = self.loss_fn(labels, self.discriminator(both))
            update(self.d_optimizer, d_loss, self.discriminator.trainable_weights)
            latent = keras.random.normal(shape=(size, self.latent_dim), seed=self.seed_generator)
            self.zero_grad()
            g_loss = self.loss_fn(torch.zeros((size, 1), device=device), self.discriminator(self.generator(latent)))
            update(self.g_optimizer, g_loss, self.generator.trainable_weights)
            self.d_loss_tracker.update_state(d_loss)
            self.g_loss_tracker.update_state(g_loss)
            return {"d_loss": self.d_loss_tracker.result(), "g_loss": self.g_loss_tracker.result()}

    class Monitor(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            images = self.model.generator(keras.random.normal((3, self.model.latent_dim), seed=5))
            logs["generated"] = float(images.detach().cpu().numpy().mean())

    model = GAN(mlp(4, 1), mlp(2, 4, name="generator"), 2)
    model.compile(Adam(0.01), Adam(0.02), keras.losses.BinaryCrossentropy(from_logits=True))
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(X))
    return model, (torch.utils.data.DataLoader(dataset, batch_size=8),), {"callbacks": [Monitor()]}


def gan_with_parameters(base):
    model, data, options = gan(base)
    model.zero_grad()  # Keras registers the parameters of a layer with torch when they are first asked for.
    return model, data, options


def gradient_penalty(base):
    class WGAN(base):
        def __init__(self):
            super().__init__()
            self.discriminator, self.generator = mlp(4, 1), mlp(2, 4, name="generator")
            self.seed = keras.random.SeedGenerator(1)
            self.built = True

        def compile(self, d_optimizer, g_optimizer):
            super().compile()
            self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

        def penalty(self, real, fake):
            alpha = keras.random.uniform((real.shape[0], 1), seed=self.seed)
            between = (real + alpha * (fake - real)).detach().requires_grad_(True)
            [gradient] = torch.autograd.grad(self.discriminator(between).sum(), between, create_graph=True)
            return ((gradient.norm(dim=1) - 1) ** 2).mean()

        def train_step(self, real):
            for _ in range(2):
                self.zero_grad()
                fake = self.generator(keras.random.normal((real.shape[0], 2), seed=self.seed))
                d_loss = self.discriminator(fake).mean() - self.discriminator(real).mean()
                d_loss = d_loss + 10 * self.penalty(real, fake)
                update(self.d_optimizer, d_loss, self.discriminator.trainable_weights)
            self.zero_grad()
            g_loss = -self.discriminator(self.generator(keras.random.normal((8, 2), seed=self.seed))).mean()
            g_loss.backward()
            torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 0.5)
            gradients = [weight.value.grad for weight in self.generator.trainable_weights]
            with torch.no_grad():
                self.g_optimizer.apply(gradients, self.generator.trainable_weights)
            return {"d_loss": d_loss, "g_loss": g_loss}

    model = WGAN()
    model.compile(Adam(0.01), keras.optimizers.SGD(0.1))
    return model, (X,), {}


class Quantizer(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.codes = self.add_weight(shape=(2, 6), initializer="random_uniform", name="codes")

    def call(self, x):
        distances = (x**2).sum(axis=1, keepdims=True) + (self.codes.value**2).sum(axis=0) - 2 * x @ self.codes.value
        quantized = self.codes.value.T[distances.argmin(axis=1)]
        self.add_loss(0.25 * ((quantized.detach() - x) ** 2).mean() + ((quantized - x.detach()) ** 2).mean())
        return x + (quantized - x).detach()


def vq_vae(base):
    class VQVAE(base):
        def __init__(self):
            super().__init__()
            start = keras.Input((4,))
            self.vqvae = keras.Model(start, mlp(2, 4)(Quantizer()(mlp(4, 2)(start))))
            self.total = keras.metrics.Mean(name="total_loss")
            self.built = True

        @property
        def metrics(self):
            return [self.total]

        def train_step(self, x):
            self.zero_grad()
            total = ((x - self.vqvae(x)) ** 2).mean() + sum(self.vqvae.losses)
            update(self.optimizer, total, self.vqvae.trainable_variables)
            self.total.update_state(total)
            return {"loss": self.total.result()}

    model = VQVAE()
    model.compile(optimizer=Adam(0.01))
    return model, (X,), {}


def followed_by_an_average(base):
    class Followed(base):
        def __init__(self):
            super().__init__()
            self.network = mlp(4, 3)
            self.ema_network = keras.models.clone_model(self.network)
            self.ema_network.set_weights(self.network.get_weights())
            self.queue = self.add_weight(shape=(4, 3), trainable=False, name="queue")

        def call(self, x):
            return self.ema_network(x)

        def train_step(self, data):
            x, y = data
            self.zero_grad()
            logits = self.network(x, training=True)
            loss = torch.nn.functional.cross_entropy(logits, y.long()) + (logits @ self.queue.value.T).mean()
            update(self.optimizer, loss, self.network.trainable_weights)
            with torch.no_grad():
                for average, weight in zip(self.ema_network.weights, self.network.weights, strict=True):
                    average.assign(0.9 * average + 0.1 * weight)
            self.queue.assign(torch.cat([logits.detach()[:1], self.queue.value[:-1]]))
            return {"cross_entropy": loss}

        def test_step(self, data):
            x, y = data
            return {"cross_entropy": torch.nn.functional.cross_entropy(self(x), y.long())}

    model = Followed()
    model.compile(optimizer=Adam(0.01))
    return model, (X, LABELS), {"validation_data": (X, LABELS)}


MODELS = [supervised, weighted, gan, gan_with_parameters, gradient_penalty, vq_vae, followed_by_an_average]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_model_with_backward_passes_trains_as_in_keras(make):
    trains_as_keras(make)
