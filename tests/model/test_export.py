"""`Model.export`, and its errors. Row F4 runs exported models elsewhere."""

import keras
import onnx
import onnxruntime
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import ExportError
from tests.models import functional, sequential
from tests.numbers import close, normal

names_an_old_type = pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")  # A file of Keras's.

X = normal(5, 3)


def assert_exported(model, path, expected):
    """The file that a model writes gives the expected outputs in its own runtime."""
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    [outputs] = session.run(None, {session.get_inputs()[0].name: X})
    close(outputs, expected, atol=1e-5)


@names_an_old_type
@pytest.mark.parametrize("make", [functional, sequential])
def test_export_of_a_loaded_model_needs_no_call_first(make, tmp_path):
    model = make()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    config = loaded.get_config()
    assert_exported(loaded, tmp_path / "model.onnx", model.predict(X, verbose=0))
    assert loaded.get_config() == config


def gelu(approximate):
    return layers.Activation(lambda x: ops.gelu(x, approximate=approximate))


LAYERS = {
    "layer normalization": lambda: [layers.LayerNormalization(), layers.Dense(3)],
    "exact gelu": lambda: [layers.Dense(3), gelu(False), layers.Dense(2), gelu(False)],
    "approximate gelu": lambda: [layers.Dense(3), gelu(True), layers.Dense(2), gelu(True)],
}


@names_an_old_type
@pytest.mark.parametrize("kind", LAYERS)
def test_export_writes_layers_that_runtimes_compute(kind, tmp_path):
    model = functional(*LAYERS[kind]())
    assert_exported(model, tmp_path / "model.onnx", model.predict(X, verbose=0))
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def standardized():
    """A model whose first layer has the mean and variance of the data as constants."""
    normalization = layers.Normalization()
    normalization.adapt(X)
    return functional(normalization, layers.Dense(3))


@pytest.mark.backend("jax", "torch")
def test_export_keeps_the_constants_of_layers(tmp_path):
    model = standardized()
    assert_exported(model, tmp_path / "model.onnx", model.predict(X, verbose=0))


@pytest.mark.backend("tensorflow")
@names_an_old_type
def test_export_refuses_constants_that_the_converter_loses_and_leaves_no_file(tmp_path):
    with pytest.raises(ExportError, match=r"does not keep the constants .*normalization.*tf_saved_model"):
        standardized().export(tmp_path / "model.onnx", format="onnx", verbose=False)
    assert list(tmp_path.iterdir()) == []


class Unknown(layers.Layer):
    """Fails when a model of it is traced, like an operation that has no symbolic form."""

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, x):
        raise NotImplementedError("no such operation")


def test_export_names_what_a_converter_refuses_and_another_way_and_keeps_an_older_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=r"on this backend: .*no such operation.*on another backend.*HL602"):
        functional(Unknown()).export(path, format="onnx", verbose=False)
    assert path.read_bytes() == b"before"


def test_export_of_a_model_that_was_never_built_raises_the_error_of_keras(tmp_path):
    class Net(hl.Model):
        def call(self, x):
            return ops.relu(x)

    with pytest.raises(ValueError, match=r"built|called") as raised:
        Net().export(tmp_path / "model.onnx", format="onnx", verbose=False)
    assert not isinstance(raised.value, ExportError)
