"""PyTorch: affine transformations of images (rotation, zoom, translation) of a whole batch at once, in a trace.

Keras loops over the images in Python, and a trace would hold every pass: 3600 operations for 32 images. Here the images
become channels of one image, whose pixels are then read at their own places, as Keras reads those of each.

Internals used: `affine_transform` of `image` (see `_keras.py`), which is replaced, `map_coordinates`, which reads the
pixels, and `AFFINE_TRANSFORM_INTERPOLATIONS`, its orders by name.
"""

from collections.abc import Callable

import torch

from handloom._keras import Tensor, image, keras
from handloom._util.patch import Patch
from handloom.backends.torch.fake import is_traced


def _of_a_batch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def affine_transform(
        images: Tensor,
        transform: Tensor,
        interpolation: str = "bilinear",
        fill_mode: str = "constant",
        fill_value: float = 0,
        data_format: str | None = None,
    ) -> Tensor:
        images, transform = map(keras.ops.convert_to_tensor, (images, transform))
        order = image.AFFINE_TRANSFORM_INTERPOLATIONS.get(interpolation)
        # Lower precisions cannot count the channels of all images; and fake gradients of this have other strides.
        known = images.ndim == 4 and transform.ndim == 2 and transform.dtype == torch.float32 and order is not None
        if not known or images.requires_grad or transform.requires_grad:
            return original(images, transform, interpolation, fill_mode, fill_value, data_format)
        channels_first = (data_format or keras.config.image_data_format()) == "channels_first"
        last = images.permute(0, 2, 3, 1) if channels_first else images
        batch, height, width, channels = last.shape
        merged = last.permute(1, 2, 0, 3).reshape(height, width, batch * channels)
        places = [place.expand(height, width, batch, channels) for place in _places(last.shape, transform)]
        read = image.map_coordinates(
            merged, [each.reshape(merged.shape) for each in places], order, fill_mode, fill_value
        )
        apart = read.reshape(height, width, batch, channels)
        return apart.permute((2, 3, 0, 1) if channels_first else (2, 0, 1, 3)).contiguous()

    return affine_transform


def _places(shape: torch.Size, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row, the column and the channel from which each pixel comes, by (height, width, batch, channels)."""
    batch, height, width, channels = (
        torch.arange(size, dtype=torch.float32, device=transform.device) for size in shape
    )
    y, x = height[:, None, None, None], width[:, None, None]
    a0, a1, a2, b0, b1, b2, c0, c1 = transform[:, :, None].unbind(1)
    rows, columns = y * b1 + x * b0 + channels * c0 + b2, y * a1 + x * a0 + channels * c1 + a2
    return rows, columns, len(channels) * batch[:, None] + channels


batched_transforms = Patch((image, "affine_transform", _of_a_batch), when=is_traced)
"""Inside, `keras.ops.image.affine_transform` has no loop over images."""
