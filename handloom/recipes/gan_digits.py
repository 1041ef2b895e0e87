"""Handwritten digits drawn by a GAN: two networks, two optimizers, one step."""

from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.recipes import digits
from handloom.report import frechet_distance, save_curves, save_image_grid

LATENT = 32


def build_generator() -> keras.Model:
    """Makes an image of 8x8 pixels from noise."""
    noise = keras.Input((LATENT,))
    x = layers.Dense(4 * 4 * 64, use_bias=False)(noise)
    x = layers.LeakyReLU(0.2)(layers.BatchNormalization()(x))
    x = layers.Reshape((4, 4, 64))(x)
    x = layers.Conv2DTranspose(32, 4, strides=2, padding="same", use_bias=False)(x)
    x = layers.LeakyReLU(0.2)(layers.BatchNormalization()(x))
    return keras.Model(noise, layers.Conv2D(1, 3, padding="same", activation="tanh")(x), name="generator")


def build_discriminator() -> keras.Model:
    """Tells drawn images (positive) from real ones (negative)."""
    image = keras.Input((8, 8, 1))
    x = layers.LeakyReLU(0.2)(layers.Conv2D(32, 3, padding="same")(image))
    x = layers.LeakyReLU(0.2)(layers.Conv2D(64, 4, strides=2, padding="same")(x))
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(1)(x), name="discriminator")


class GAN(hl.Model):
    """A generator and a discriminator, each trained against the other (Goodfellow et al., 2014)."""

    def __init__(self, generator: keras.Model, discriminator: keras.Model) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.seed = keras.random.SeedGenerator(0)

    def train_step(self, real):
        noise = keras.random.normal((len(real), LATENT), seed=self.seed)

        def loss_of_discriminator():
            drawn = ops.stop_gradient(self.generator(noise, training=True))
            judged_drawn, judged_real = (
                self.discriminator(drawn, training=True),
                self.discriminator(real, training=True),
            )
            return ops.mean(ops.softplus(-judged_drawn)) + ops.mean(ops.softplus(judged_real))

        def loss_of_generator():
            judged = self.discriminator(self.generator(noise, training=True), training=True)
            return ops.mean(ops.softplus(judged))

        return {
            "d_loss": self.minimize(loss_of_discriminator, wrt=self.discriminator),
            "g_loss": self.minimize(loss_of_generator, wrt=self.generator),
        }

    def draw(self, count: int) -> np.ndarray:
        noise = np.random.default_rng(0).standard_normal((count, LATENT), dtype="float32")
        return self.generator.predict(noise, verbose=0)


class Samples(keras.callbacks.Callback):
    """Draws the same 64 noises after each epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        save_image_grid(self.model.draw(64), self.folder / f"epoch-{epoch + 1:03}.png")


def main(run_dir: Path, epochs: int = 80) -> str:
    """Trains, saves the generator, its curves and samples, and says how near its digits come to real ones."""
    keras.utils.set_random_seed(0)
    (real, _), (held_out, _) = digits.load()
    gan = GAN(build_generator(), build_discriminator())
    adam = {name: keras.optimizers.Adam(5e-4, beta_1=0.5) for name in ("generator", "discriminator")}
    gan.compile(optimizer=adam)
    history = gan.fit(real, batch_size=64, epochs=epochs, callbacks=[Samples(run_dir / "samples")], run_dir=run_dir)
    save_curves(history, run_dir / "curves.png")
    gan.generator.save(run_dir / "model.keras")

    classifier = digits.build()
    digits.train(classifier, epochs=20, verbose=0)
    describe = keras.Model(classifier.inputs, classifier.get_layer("features").output)
    noise = np.random.default_rng(0).uniform(-1, 1, held_out.shape)
    candidates = {"real digits": real, "drawn ones": gan.draw(len(held_out)), "noise": noise}
    features = {name: describe.predict(images, verbose=0) for name, images in candidates.items()}
    far = {name: frechet_distance(found, describe.predict(held_out, verbose=0)) for name, found in features.items()}
    return "Fréchet distance to held-out digits: " + ", ".join(f"{name} {value:.1f}" for name, value in far.items())
