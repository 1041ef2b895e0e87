"""One file of training steps, which `test_parity.py` runs on each backend; no line of it names a backend."""

import sys
import warnings

import keras
import numpy as np
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning

STEPS, BATCH, BATCHES, CLASSES = 200, 32, 4, 5
RATE, PENALTY = 0.05, 1e-2


def images():
    """Batches of images 6x6 and labels that depend on them."""
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(BATCHES, BATCH, 6, 6, 1)).astype("float32")
    y = (x[..., 0] @ numbers.normal(size=(6, CLASSES))).sum(axis=2).argmax(-1).astype("int32")
    return list(zip(x, y, strict=True))


def points():
    """Points on a circle, and noise to draw others from."""
    numbers = np.random.default_rng(1)
    angles = numbers.uniform(0, 2 * np.pi, BATCH * BATCHES)
    real = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return real.astype("float32"), numbers.normal(size=(len(real), 4)).astype("float32")


# Only smooth activations: at a kink the last bit decides. No bias before batch normalization: its true gradient is
# zero, and the rounding of zero differs.


def build_classifier():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(8, 3, use_bias=False, kernel_regularizer=keras.regularizers.L2(PENALTY)),
            layers.BatchNormalization(),
            layers.Activation("softplus"),
            layers.Flatten(),
            layers.Dense(CLASSES, kernel_regularizer=keras.regularizers.L2(PENALTY)),
        ]
    )


class GAN(hl.Model):
    def __init__(self):
        super().__init__()
        drawing = layers.Dense(16, use_bias=False), layers.BatchNormalization(), layers.Activation("tanh")
        judging = layers.Dense(16, "tanh", kernel_regularizer=keras.regularizers.L2(PENALTY))
        self.generator = keras.Sequential([keras.Input((4,)), *drawing, layers.Dense(2)])
        self.discriminator = keras.Sequential([keras.Input((2,)), judging, layers.Dense(1)])
        self.certainty = keras.metrics.Mean(name="certainty")

    def train_step(self, data):
        real, noise = data

        def d_loss():
            judged_real = self.discriminator(real, training=True)
            judged_drawn = self.discriminator(self.generator(noise, training=True), training=True)
            self.certainty.update_state(ops.sigmoid(judged_real))
            return ops.mean(ops.softplus(-judged_real)) + ops.mean(ops.softplus(judged_drawn))

        def g_loss():
            judged = self.discriminator(self.generator(noise, training=True), training=True)
            return ops.mean(ops.softplus(-judged))

        return {
            "d_loss": self.minimize(d_loss, wrt=self.discriminator),
            "g_loss": self.minimize(g_loss, wrt=self.generator),
            "certainty": self.certainty,
        }


def classify(start):
    """A loop written by hand over a compiled function."""
    model = build_classifier()
    model.set_weights(start)
    optimizer = keras.optimizers.SGD(RATE)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy, mean_loss = keras.metrics.SparseCategoricalAccuracy(), keras.metrics.Mean()

    @hl.function
    def train_step(x, y):
        def loss_of_batch():
            logits = model(x, training=True)
            return loss_fn(y, logits), logits

        loss, logits = hl.minimize(loss_of_batch, model, optimizer, has_aux=True)
        accuracy.update_state(y, logits)
        mean_loss.update_state(loss)
        return loss

    batches = images()
    losses = [train_step(*batches[step % BATCHES]) for step in range(STEPS)]
    return {
        "losses": np.array([float(loss) for loss in losses]),
        "accuracy": float(accuracy.result()),
        "mean loss": float(mean_loss.result()),
        **_weights(model),
    }


def draw(start):
    """A custom step of a model in `fit`; epochs of one step each, so that the history has every step."""
    gan = GAN()
    gan.set_weights(start)
    sgd = {"discriminator": keras.optimizers.SGD(RATE), "generator": keras.optimizers.SGD(RATE, momentum=0.5)}
    gan.compile(optimizer=sgd)
    feed = hl.Feed(points(), batch_size=BATCH)
    history = gan.fit(feed, epochs=STEPS, steps_per_epoch=1, verbose=0).history
    return {name: np.array(values) for name, values in history.items()} | _weights(gan)


def _weights(model):
    """By number and name; Keras counts the names of layers on from the first mode to the second."""
    return {f"{index} {weight.name}": ops.convert_to_numpy(weight) for index, weight in enumerate(model.weights)}


def main(results_file, start_file):
    warnings.simplefilter("error", HandloomWarning)  # A step that falls back is not compiled.
    with np.load(start_file) as loaded:
        start = {case: [loaded[key] for key in loaded if key.startswith(case)] for case in ("classify", "draw")}
    results = {}
    for mode, eagerly in (("compiled", False), ("eager", True)):
        with hl.run_eagerly(eagerly):
            for case in (classify, draw):
                found = case(start[case.__name__])
                results |= {f"{mode}/{case.__name__}/{name}": value for name, value in found.items()}
    np.savez(results_file, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
