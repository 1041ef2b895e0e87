"""JAX: exported pooling layers, run by onnxruntime."""

import keras
import onnx
import onnxruntime
import pytest
from keras import layers

import handloom as hl
from tests.numbers import close, normal

IMAGES, VOLUMES, SERIES = normal(3, 8, 6, 2), normal(2, 6, 4, 4, 2), normal(3, 8, 2)

POOLS = {
    "valid": (IMAGES, layers.MaxPooling2D(2)),
    "same": (IMAGES, layers.MaxPooling2D(3, strides=2, padding="same")),
    "overlapping": (IMAGES, layers.MaxPooling2D(3, strides=1)),
    "of one axis": (IMAGES, layers.MaxPooling2D((2, 1))),
    "of one element": (IMAGES, layers.MaxPooling2D(1)),
    "by strides alone": (IMAGES, layers.MaxPooling2D(1, strides=2)),
    "channels first": (IMAGES, layers.MaxPooling2D(2, data_format="channels_first")),
    "volumes": (VOLUMES, layers.MaxPooling3D(2, strides=(2, 1, 2))),
    "series": (SERIES, layers.MaxPooling1D(2)),
    "two of one input": (IMAGES, lambda x: layers.MaxPooling2D(2, padding="same")(x) - layers.MaxPooling2D(2)(x)),
    "one after the other": (
        IMAGES,
        keras.Sequential([layers.MaxPooling2D(2), layers.Conv2D(3, 1), layers.MaxPooling2D(2)]),
    ),
}


@pytest.mark.parametrize(("x", "pool"), POOLS.values(), ids=POOLS.keys())
def test_export_to_onnx_of_pools_gives_the_same_outputs(x, pool, tmp_path):
    inputs = keras.Input(x.shape[1:])
    model = hl.Model(inputs, pool(inputs))
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    [outputs] = session.run(None, {session.get_inputs()[0].name: x})
    close(outputs, model.predict(x, verbose=0))
    graph = onnx.load(path).graph
    assert {constant.name for constant in graph.initializer} <= {name for node in graph.node for name in node.input}
