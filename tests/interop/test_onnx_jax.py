"""JAX: exported pools, run by onnxruntime."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers

import handloom as hl

numbers = np.random.default_rng(0)
IMAGES = numbers.normal(size=(3, 8, 6, 2)).astype("float32")
VOLUMES = numbers.normal(size=(2, 6, 4, 4, 2)).astype("float32")
SERIES = numbers.normal(size=(3, 8, 2)).astype("float32")

POOLS = {
    "valid": (IMAGES, layers.MaxPooling2D(2)),
    "same": (IMAGES, layers.MaxPooling2D(3, strides=2, padding="same")),
    "overlapping": (IMAGES, layers.MaxPooling2D(3, strides=1)),
    "of one axis": (IMAGES, layers.MaxPooling2D((2, 1))),
    "of nothing": (IMAGES, layers.MaxPooling2D(1)),
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
def test_pools_run_and_give_the_same(x, pool, tmp_path):
    inputs = keras.Input(x.shape[1:])
    model = hl.Model(inputs, pool(inputs))
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    [outputs] = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), atol=1e-6)
    graph = onnx.load(path).graph
    assert {constant.name for constant in graph.initializer} <= {name for node in graph.node for name in node.input}
