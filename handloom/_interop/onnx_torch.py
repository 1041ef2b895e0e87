"""PyTorch: changes that its ONNX exporter needs while Keras exports a model."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from handloom._keras import Tensor
from handloom._util.patch import Patch


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Within the block, Keras can export a model, without the warnings that users cannot act on."""
    with _sizes_are_numbers, warnings.catch_warnings():
        # Sizes and constants of layers are written as the numbers they are. Keras chose the old exporter.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        yield


def _sizes_as_numbers(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer_norm(x: Tensor, normalized_shape: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
        return original(x, list(map(int, normalized_shape)), *args, **kwargs)

    return layer_norm


_sizes_are_numbers = Patch((torch.nn.functional, "layer_norm", _sizes_as_numbers))
"""Gives `layer_norm` the sizes to normalize over as numbers, as ONNX needs them; in a trace they are tensors."""
