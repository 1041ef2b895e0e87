"""Affine transformations of images in a compiled step: as in Keras, image by image."""

import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.numbers import close, normal

pytestmark = pytest.mark.backend("torch")

IMAGES = normal(3, 6, 5, 2)
TRANSFORMS = np.array(
    [[1, 0, 1.3, 0, 1, -0.7, 0, 0], [0.8, 0.2, 0, -0.3, 1.1, 0.4, 0, 0], [0, -1, 4, 1, 0, 0, 0, 0]], "float32"
)


@pytest.mark.parametrize("fill_mode", ["constant", "nearest", "wrap", "mirror", "reflect"])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_affine_transform_of_a_compiled_function_is_that_of_keras(interpolation, fill_mode, data_format):
    images = IMAGES if data_format == "channels_last" else IMAGES.transpose(0, 3, 1, 2)
    options = {"fill_mode": fill_mode, "fill_value": 0.5, "data_format": data_format}

    def transform(images, transforms):
        return ops.image.affine_transform(images, transforms, interpolation, **options)

    # Keras changes the transformations that it is given.
    close(hl.function(transform)(images, TRANSFORMS.copy()), transform(images, TRANSFORMS.copy()), rtol=1e-4, atol=1e-5)


def test_random_translation_of_a_compiled_function_is_traced_without_a_loop_and_is_that_of_keras():
    layer = layers.RandomTranslation(0.3, 0.3, seed=1)
    start = layer.generator.state.numpy()
    compiled = hl.function(lambda images: layer(images, training=True))
    found = compiled(np.tile(IMAGES, (8, 1, 1, 1)))
    [[version]] = compiled._versions.values()
    assert len(version._program._graph.graph.nodes) < 300
    layer.generator.state.assign(start)
    close(found, layer(np.tile(IMAGES, (8, 1, 1, 1)), training=True), rtol=1e-4, atol=1e-5)


def test_gradient_through_affine_transform_of_a_compiled_function_is_that_of_keras():
    def gradient(images):
        return hl.grad(lambda images: ops.sum(ops.image.affine_transform(images, TRANSFORMS.copy()) ** 2))(images)

    close(hl.function(gradient)(IMAGES), gradient(IMAGES), rtol=1e-4, atol=1e-5)
