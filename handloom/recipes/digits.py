"""Handwritten digits classified: a plain step, its metric, and validation with `hl.fit`."""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import handloom as hl
from handloom.report import save_curves


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1,797 scanned digits of 8x8 pixels between -1 and 1, a third of them held out."""
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 8 - 1).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=1 / 3, random_state=0, stratify=y)
    return (x_train, y_train), (x_test, y_test)


def build() -> keras.Model:
    """A small convolutional network. Its last hidden layer, `features`, represents a digit by 32 numbers."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(32, 3, activation="relu")(inputs)
    x = layers.Conv2D(32, 3, activation="relu")(x)
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    x = layers.Dense(32, activation="relu", name="features")(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def train(model: keras.Model, epochs: int, **options) -> keras.callbacks.History:
    """Trains a classifier with a step written by hand."""
    optimizer = keras.optimizers.Adam(2e-3)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    def train_step(x, y):
        def loss_of_batch():
            logits = model(x, training=True)
            return loss_fn(y, logits), logits

        loss, logits = hl.minimize(loss_of_batch, model, optimizer, has_aux=True)
        accuracy.update_state(y, logits)
        return {"loss": loss, "accuracy": accuracy}

    def test_step(x, y):
        logits = model(x, training=False)
        accuracy.update_state(y, logits)
        return {"loss": loss_fn(y, logits), "accuracy": accuracy}

    train_data, held_out = load()
    return hl.fit(
        train_step,
        hl.Feed(train_data, batch_size=64, shuffle=True),
        epochs=epochs,
        state={"model": model, "optimizer": optimizer, "accuracy": accuracy},
        validate=(test_step, held_out),
        **options,
    )


def main(run_dir: Path, epochs: int = 30) -> str:
    """Trains, saves the model and its curves, and returns the accuracy on held-out digits."""
    hl.set_random_seed(0)
    model = build()
    history = train(model, epochs, run_dir=run_dir)
    save_curves(history, run_dir / "curves.png")
    model.save(run_dir / "model.keras")
    return f"Accuracy on held-out digits: {history.history['val_accuracy'][-1]:.3f}."
