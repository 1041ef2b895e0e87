"""Nested structures, separated into tensors and everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import optree

from handloom._keras import Tensor
from handloom.backends import backend


class Structure:
    """A nested structure, separated into its tensors, which go through the backend, and everything else.

    Args:
        tree: The structure.
        is_tensor: Whether a leaf is a tensor.

    Attributes:
        tensors: The tensors and arrays, in order.
        rest: All leaves, with `None` in place of the tensors.
        spec: The shape of the structure.
    """

    def __init__(self, tree: Any, is_tensor: Callable[[Any], bool] = backend.is_array) -> None:
        leaves, self.spec = optree.tree_flatten(tree)
        self._places = [index for index, leaf in enumerate(leaves) if is_tensor(leaf)]
        self.tensors = [leaves[place] for place in self._places]
        self.rest = [None if is_tensor(leaf) else leaf for leaf in leaves]

    def filled(self, tensors: Iterable[Tensor]) -> Any:
        """The structure with other tensors."""
        leaves = list(self.rest)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return optree.tree_unflatten(self.spec, leaves)
