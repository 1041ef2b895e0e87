"""What a function is called with and returns: the tensors, which may change, and the rest, which may not."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import optree

from handloom._keras import Tensor, keras
from handloom._trace.loss_weight import step_weight
from handloom.backends import backend


class Arguments:
    """The arguments of one call, taken apart into tensors, which may change, and the rest, which may not."""

    def __init__(self, leaves: Sequence[Any], structure: optree.PyTreeSpec) -> None:
        self._structure = structure
        self._through = [index for index, leaf in enumerate(leaves) if backend.is_array(leaf)]
        self.tensors = [backend.to_tensor(leaves[index]) for index in self._through]
        # Static values keep what they hold alive: an id is of use only so long.
        self._static = [None if backend.is_array(leaf) else leaf for leaf in leaves]
        self.key = (
            structure,
            *((backend.signature(tensor), backend.placement(tensor)) for tensor in self.tensors),
            *(_static_key(leaf) for leaf in self._static),
        )

    def call(self, fn: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Calls a function with these arguments, and these tensors in them."""
        leaves = list(self._static)
        for index, tensor in zip(self._through, tensors, strict=True):
            leaves[index] = keras.ops.convert_to_tensor(tensor)
        args, kwargs = optree.tree_unflatten(self._structure, leaves)
        examples = next((tensor.shape[0] for tensor in tensors if len(tensor.shape)), 1)
        with step_weight(examples):
            return fn(*args, **kwargs)


class Outputs:
    """What a version returns, taken apart likewise; filled while it is traced."""

    def put(self, result: Any) -> list[Tensor]:
        leaves, self._structure = optree.tree_flatten(result)
        leaves = [_as_tensor(leaf) for leaf in leaves]
        self._through = [index for index, leaf in enumerate(leaves) if backend.is_array(leaf)]
        self.rest = [None if backend.is_array(leaf) else leaf for leaf in leaves]
        return [leaves[index] for index in self._through]

    def get(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.rest)
        for index, tensor in zip(self._through, tensors, strict=True):
            leaves[index] = tensor
        return optree.tree_unflatten(self._structure, leaves)


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, keras.Variable):
        return keras.ops.copy(leaf.value)
    if backend.is_array(leaf) or isinstance(leaf, (bool, int, float, complex)):
        return keras.ops.convert_to_tensor(leaf)
    return leaf


def _static_key(leaf: Any) -> Hashable:
    if isinstance(leaf, (keras.Variable, keras.Layer)):
        return type(leaf), id(leaf)
    return type(leaf), leaf  # 2 and 2.0 and True are equal, but not the same to a function.
