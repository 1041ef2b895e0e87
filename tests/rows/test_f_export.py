"""Row F4: export. What is written runs without this package, and gives the same."""

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
from tests.rows import exported
from tests.rows.real_data import digits, photographs

pytestmark = [
    # What the exporters call is on its way out; by Keras's own choice, and nothing of it is ours.
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
    """A `call` and a `train_step` of its own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(16), layers.Dense(10, activation="softmax")
        self.normalized, self.dropout = layers.BatchNormalization(), layers.Dropout(0.2)

    def call(self, x, training=False):
        hidden = self.normalized(softplus(self.hidden(layers.Flatten()(x))), training=training)
        return self.out(self.dropout(hidden, training=training))

    def train_step(self, data):
        x, y = data

        def loss_fn():
            return ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x, training=True)))

        return {"loss": self.minimize(loss_fn)}


def functional():
    image = keras.Input((8, 8, 1))
    hidden = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(image)
    hidden = layers.Dropout(0.2)(layers.BatchNormalization()(hidden))
    return hl.Model(image, layers.Dense(10, activation="softmax")(layers.Flatten()(hidden)))


def of_photographs():
    """Says of which photograph a piece is."""
    piece = keras.Input((32, 32, 3))
    hidden = layers.MaxPooling2D(2)(layers.Conv2D(8, 3, padding="same", activation="gelu")(piece))
    hidden = layers.GlobalAveragePooling2D()(layers.LayerNormalization()(layers.SeparableConv2D(8, 3)(hidden)))
    model = hl.Model(piece, layers.Dense(2, activation="softmax")(hidden))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(*photographs(), batch_size=64, epochs=1, verbose=0)
    return model


def trained(build):
    x, y = digits()
    model = build()
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x.reshape(-1, 8, 8, 1)[:320], y[:320], epochs=2, verbose=0)
    return model


def images():
    """Seven of them: no size that training or tracing knew."""
    return digits()[0].reshape(-1, 8, 8, 1)[1000:1007]


def run_elsewhere(kind, folder, **inputs):
    """The outputs of two calls of each model by name, from a process that knows neither this package nor Keras."""
    for name, x in inputs.items():
        np.save(folder / f"{name}.in.npy", x)
    subprocess.run([sys.executable, exported.__file__, kind, folder], cwd=folder, check=True)
    return {name: np.load(folder / f"{name}.out.npy") for name in inputs}


@every_kind  # Slow: TensorFlow is loaded in two processes, or jax2onnx with all that it brings in one.
def test_f4_exported_models_run_without_this_package(kind, tmp_path, shown):
    models = {"functional": trained(functional), "subclassed": trained(Subclassed), "photographs": of_photographs()}
    inputs = {"functional": images(), "subclassed": images(), "photographs": photographs()[0][256:263]}
    for name, model in models.items():
        model.export(tmp_path / name, format=kind, verbose=False)
    for name, calls in run_elsewhere(kind, tmp_path, **inputs).items():
        for outputs in calls:
            np.testing.assert_allclose(outputs, models[name].predict(inputs[name], verbose=0), atol=1e-5)
    shown(f"{kind}: run without this package, equal (atol 1e-5)")


class Counting(layers.Layer):
    """Adds how often it was called before."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        calls = ops.copy(self.calls.value)
        self.calls.assign(calls + 1)
        return x + calls


@pytest.fixture
def counting():
    """A model that was called once, and once for its shapes."""
    x = keras.Input((3,))
    model = hl.Model(x, Counting()(x))
    model.set_weights([np.zeros(())])
    model.predict(np.zeros((2, 3), "float32"), verbose=0)
    return model


def test_f4_onnx_has_no_state_and_each_call_is_the_first(counting, tmp_path):
    counting.export(tmp_path / "counting", format="onnx", verbose=False)
    calls = run_elsewhere("onnx", tmp_path, counting=np.zeros((2, 3), "float32"))["counting"]
    np.testing.assert_array_equal(calls, [np.ones((2, 3)), np.ones((2, 3))])


@pytest.mark.backend("jax", "tensorflow")
def test_f4_a_saved_model_goes_on_from_the_state_it_had(counting, tmp_path):
    counting.export(tmp_path / "counting", verbose=False)
    calls = run_elsewhere("tf_saved_model", tmp_path, counting=np.zeros((2, 3), "float32"))["counting"]
    np.testing.assert_array_equal(calls, [np.ones((2, 3)), np.full((2, 3), 2.0)])


@every_kind
def test_f4_the_model_stays_as_it_is_and_trains_on(counting, kind, tmp_path):
    for model in (counting, trained(functional)):
        before = model.get_weights()
        model.export(tmp_path / model.name, format=kind, verbose=False)
        for now, then in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(counting.predict(np.zeros((2, 3), "float32"), verbose=0), np.ones((2, 3)))
    x, y = digits()
    assert np.isfinite(model.fit(x.reshape(-1, 8, 8, 1)[:32], y[:32], verbose=0).history["loss"]).all()


@pytest.mark.backend("torch")  # Slow: TensorFlow is loaded in two processes.
def test_f4_on_torch_the_error_names_the_way_to_a_saved_model_and_it_works(tmp_path, refused):
    model, x = trained(functional), images()
    with pytest.raises(ExportError, match='format="onnx"') as raised:
        model.export(tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []

    command = str(raised.value).partition("then ")[2].partition(". [HL")[0]
    assert command.startswith("KERAS_BACKEND=tensorflow python -c ")
    model.save(tmp_path / "model.keras")
    command = command.replace("python", f"'{sys.executable}'")
    root = str(Path(__file__).parents[2])
    subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, check=True)
    for outputs in run_elsewhere("tf_saved_model", tmp_path, exported=x)["exported"]:
        np.testing.assert_allclose(outputs, model.predict(x, verbose=0), atol=1e-5)
    refused("tf_saved_model, which TensorFlow writes from the saved model")


class Logarithm(layers.Layer):
    """Has an operation that not every converter knows."""

    def call(self, x):
        return ops.log1p(x)


@pytest.fixture
def logarithm():
    x = keras.Input((3,))
    model = hl.Model(x, Logarithm()(x))
    model.predict(np.zeros((2, 3), "float32"), verbose=0)
    return model


@pytest.mark.backend("tensorflow")
def test_f4_an_operation_that_cannot_be_written_is_an_error_and_leaves_no_file(logarithm, tmp_path):
    with pytest.raises(ExportError, match="Log1p") as raised:
        logarithm.export(tmp_path / "logarithm", format="onnx", verbose=False)
    assert "on another backend" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.backend("jax", "torch")
def test_f4_another_backend_can_write_it(logarithm, tmp_path):
    logarithm.export(tmp_path / "logarithm", format="onnx", verbose=False)
    for outputs in run_elsewhere("onnx", tmp_path, logarithm=np.full((2, 3), 0.5, "float32"))["logarithm"]:
        np.testing.assert_allclose(outputs, np.full((2, 3), np.log(1.5)), rtol=1e-5)
