"""Tumours classified as benign or malignant by a wide and a deep path: one model, two optimizers by name."""

from pathlib import Path

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import KBinsDiscretizer, StandardScaler

import handloom as hl
from handloom.report import save_curves

BINS = 4


def load() -> tuple[tuple[dict, np.ndarray], tuple[dict, np.ndarray]]:
    """569 tumours with 30 measurements each, a third of them held out.

    The deep path gets the measurements. The wide path gets their bins and all crossings of the bins of the first ten
    measurements: one of 16 combinations for each crossing. Means and bins come from the training part only.
    """
    measured, benign = load_breast_cancer(return_X_y=True)
    train, test, y_train, y_test = train_test_split(measured, benign, test_size=1 / 3, random_state=2, stratify=benign)
    scaler = StandardScaler().fit(train)
    binner = KBinsDiscretizer(BINS, encode="ordinal", quantile_method="averaged_inverted_cdf").fit(train)

    def inputs(measured: np.ndarray) -> dict:
        return {"deep": scaler.transform(measured).astype("float32"), "wide": crossed(binner.transform(measured))}

    return (inputs(train), y_train.astype("float32")), (inputs(test), y_test.astype("float32"))


def crossed(bins: np.ndarray) -> np.ndarray:
    """Sparse features of zeros and ones: each bin, and each pair of bins of the first ten measurements."""
    single = np.eye(BINS, dtype="float32")[bins.astype(int)]
    left, right = np.triu_indices(10, k=1)
    pairs = single[:, left, :, None] * single[:, right, None, :]
    return np.concatenate([single.reshape(len(bins), -1), pairs.reshape(len(bins), -1)], axis=1)


class WideAndDeep(hl.Model):
    """A linear model of crossed features, which memorizes, and a network, which generalizes (Cheng et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = layers.Dense(1, use_bias=False)
        self.deep = keras.Sequential([layers.Dense(32, "relu"), layers.Dropout(0.3), layers.Dense(1)])

    def call(self, inputs, training=False):
        return ops.squeeze(self.wide(inputs["wide"]) + self.deep(inputs["deep"], training=training), axis=-1)


def main(run_dir: Path, epochs: int = 30) -> str:
    """Trains, saves the weights and the curves, and returns the accuracy on held-out tumours."""
    hl.set_random_seed(0)
    train, held_out = load()
    model = WideAndDeep()
    model.compile(  # Both optimizers decrease the same loss, each with its own part of the model.
        optimizer={"wide": keras.optimizers.Ftrl(0.1, l1_regularization_strength=2.0), "deep": "adam"},
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )
    history = model.fit(*train, epochs=epochs, validation_data=held_out, run_dir=run_dir)
    save_curves(history, run_dir / "curves.png")
    model.save_weights(run_dir / "model.weights.h5")
    used = np.count_nonzero(keras.ops.convert_to_numpy(model.wide.kernel))
    accuracy = history.history["val_accuracy"][-1]
    return f"Accuracy on held-out tumours: {accuracy:.3f}; {used} of {model.wide.kernel.shape[0]} wide weights in use."
