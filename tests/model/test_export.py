"""Models are exported, or an error says why not and what to do instead; that they run elsewhere is row F4."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import ExportError

names_an_old_type = pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")  # A file of Keras's.

X = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")


def functional(*parts):
    inputs = outputs = keras.Input((8,))
    for part in parts:
        outputs = part(outputs)
    return hl.Model(inputs, outputs)


def assert_exported(model, path, expected):
    """The file that a model writes gives what is expected, in its own runtime."""
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    [outputs] = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@names_an_old_type
@pytest.mark.parametrize("cls", [hl.Model, hl.Sequential])
def test_a_loaded_model_need_not_be_called_first(cls, tmp_path):
    model = cls([keras.Input((8,)), layers.Dense(3)]) if cls is hl.Sequential else functional(layers.Dense(3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    config = loaded.get_config()
    assert_exported(loaded, tmp_path / "model.onnx", model.predict(X, verbose=0))
    assert loaded.get_config() == config


@names_an_old_type
def test_a_normalized_layer_is_exported(tmp_path):
    model = functional(layers.LayerNormalization(), layers.Dense(3))
    assert_exported(model, tmp_path / "model.onnx", model.predict(X, verbose=0))


@names_an_old_type
@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "approximate"])
def test_gelu_is_exported(approximate, tmp_path):
    gelu = layers.Activation(lambda x: ops.gelu(x, approximate=approximate))
    model = functional(layers.Dense(3), gelu, layers.Dense(2), gelu)
    assert_exported(model, tmp_path / "model.onnx", model.predict(X, verbose=0))
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def standardized():
    """A model whose first layer knows mean and variance of the data, as constants."""
    normalization = layers.Normalization()
    normalization.adapt(X)
    return functional(normalization, layers.Dense(3))


@pytest.mark.backend("jax", "torch")
def test_constants_of_layers_are_exported(tmp_path):
    model = standardized()
    assert_exported(model, tmp_path / "model.onnx", model.predict(X, verbose=0))


@pytest.mark.backend("tensorflow")
@names_an_old_type
def test_constants_that_the_converter_loses_are_an_error_and_leave_no_file(tmp_path):
    with pytest.raises(ExportError, match=r"does not keep the constants .*normalization.*tf_saved_model"):
        standardized().export(tmp_path / "model.onnx", format="onnx", verbose=False)
    assert list(tmp_path.iterdir()) == []


class Unknown(layers.Layer):
    """Fails when a model of it is traced, as what has no symbolic form does."""

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, x):
        raise NotImplementedError("no such operation")


def test_what_a_converter_refuses_is_an_error_that_names_another_way_and_the_file_before_stays(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=r"on this backend: .*no such operation.*on another backend"):
        functional(Unknown()).export(path, format="onnx", verbose=False)
    assert path.read_bytes() == b"before"


def test_a_model_that_was_never_built_is_keras_to_refuse(tmp_path):
    class Net(hl.Model):
        def call(self, x):
            return ops.relu(x)

    with pytest.raises(ValueError, match=r"built|called") as raised:
        Net().export(tmp_path / "model.onnx", format="onnx", verbose=False)
    assert not isinstance(raised.value, ExportError)
