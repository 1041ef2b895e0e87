"""Row F4: exported models run without this package and give the same outputs."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import ExportError
from tests.models import functional as of_layers
from tests.numbers import close, same
from tests.rows import exported
from tests.rows.real_data import digits, photographs

pytestmark = [
    # Keras calls exporters that call deprecated functions.
    pytest.mark.filterwarnings("ignore:The `native_serialization` parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning"),
]

every_kind = pytest.mark.parametrize(
    "kind", [pytest.param("tf_saved_model", marks=pytest.mark.backend("jax", "tensorflow")), "onnx"]
)


@ops.custom_gradient
def softplus(x):
    """log(1 + exp(x)), with a gradient that is finite everywhere."""

    def grad(*inputs, upstream=None):
        return ops.sigmoid(x) * (inputs[0] if upstream is None else upstream)

    return ops.relu(x) + ops.log(1 + ops.exp(-ops.abs(x))), grad


class Subclassed(hl.Model):
    """Has a custom `call` and a custom `train_step`."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(16), layers.Dense(10, activation="softmax")
        self.normalized, self.dropout = layers.BatchNormalization(), layers.Dropout(0.2)

    def call(self, x, training=False):
        hidden = self.normalized(softplus(self.hidden(layers.Flatten()(x))), training=training)
        return self.out(self.dropout(hidden, training=training))

    def train_step(self, data):
        x, y = data
        loss = keras.losses.sparse_categorical_crossentropy
        return {"loss": self.minimize(lambda: ops.mean(loss(y, self(x, training=True))))}


def functional():
    image = keras.Input((8, 8, 1))
    hidden = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(image)
    hidden = layers.Dropout(0.2)(layers.BatchNormalization()(hidden))
    return hl.Model(image, layers.Dense(10, activation="softmax")(layers.Flatten()(hidden)))


def of_photographs():
    """Classifies the pieces of two photographs."""
    piece = keras.Input((32, 32, 3))
    hidden = layers.MaxPooling2D(2)(layers.Conv2D(8, 3, padding="same", activation="gelu")(piece))
    hidden = layers.GlobalAveragePooling2D()(layers.LayerNormalization()(layers.SeparableConv2D(8, 3)(hidden)))
    model = hl.Model(piece, layers.Dense(2, activation="softmax")(hidden))
    return compiled_and_fit(model, *photographs(), batch_size=64)


IMAGES = digits()[0].reshape(-1, 8, 8, 1)
SEVEN = IMAGES[1000:1007]  # A batch size that neither training nor tracing has seen.


def trained(build):
    return compiled_and_fit(build(), IMAGES[:320], digits()[1][:320], epochs=2)


def compiled_and_fit(model, x, y, **options):
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0, **options)
    return model


def run_elsewhere(kind, folder, **inputs):
    """The outputs of two calls of each model by name, from a process without this package and Keras."""
    for name, x in inputs.items():
        np.save(folder / f"{name}.in.npy", x)
    subprocess.run([sys.executable, exported.__file__, kind, folder], cwd=folder, check=True)
    return {name: np.load(folder / f"{name}.out.npy") for name in inputs}


@every_kind  # Slow: TensorFlow is loaded in two processes, or jax2onnx with all its imports in one.
def test_f4_export_writes_models_that_run_without_this_package(kind, tmp_path, shown):
    models = {"functional": trained(functional), "subclassed": trained(Subclassed), "photographs": of_photographs()}
    inputs = {"functional": SEVEN, "subclassed": SEVEN, "photographs": photographs()[0][256:263]}
    for name, model in models.items():
        model.export(tmp_path / name, format=kind, verbose=False)
    for name, calls in run_elsewhere(kind, tmp_path, **inputs).items():
        expected = models[name].predict(inputs[name], verbose=0)
        close(calls, [expected, expected], rtol=0, atol=1e-5)
    shown(f"{kind}: runs without this package, equal (atol 1e-5)")


class Counting(layers.Layer):
    """Adds the number of earlier calls."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        calls = ops.copy(self.calls.value)
        self.calls.assign(calls + 1)
        return x + calls


ZEROS = np.zeros((2, 3), "float32")


@every_kind
def test_f4_export_keeps_the_state_in_a_saved_model_and_leaves_the_model_as_it_is(kind, tmp_path):
    """In ONNX, which has no state, each call is the first."""
    counting = of_layers(Counting())
    counting.set_weights([np.zeros(())])
    counting.predict(ZEROS, verbose=0)
    counting.export(tmp_path / "counting", format=kind, verbose=False)
    calls = run_elsewhere(kind, tmp_path, counting=ZEROS)["counting"]
    same(calls, [ZEROS + 1, ZEROS + (1 if kind == "onnx" else 2)])
    same(counting.predict(ZEROS, verbose=0), ZEROS + 1)


@pytest.mark.backend("torch")  # Slow: TensorFlow is loaded in two processes.
def test_f4_export_on_torch_names_a_command_that_writes_a_saved_model(tmp_path, refused):
    model = trained(functional)
    with pytest.raises(ExportError, match='format="onnx"') as raised:
        model.export(tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []

    command = str(raised.value).partition("then ")[2].partition(". [HL")[0]
    assert command.startswith("KERAS_BACKEND=tensorflow python -c ")
    model.save(tmp_path / "model.keras")
    command = command.replace("python", f"'{sys.executable}'")
    root = str(Path(__file__).parents[2])
    subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, check=True)
    for outputs in run_elsewhere("tf_saved_model", tmp_path, exported=SEVEN)["exported"]:
        close(outputs, model.predict(SEVEN, verbose=0), rtol=0, atol=1e-5)
    refused("tf_saved_model, which TensorFlow writes from the saved model")
