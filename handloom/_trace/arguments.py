"""Arguments and results of compiled functions."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import optree

from handloom._keras import Tensors, keras
from handloom._trace.left_out import LeftOut
from handloom._trace.loss_weight import step_weight
from handloom._trace.structure import Structure
from handloom.backends import backend


class Arguments:
    """The arguments of one call: tensors, which may change from call to call, and static values, which may not.

    Attributes:
        tensors: The tensors, as the backend takes them.
        key: Structure, shapes, dtypes, devices and static values.
    """

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        # Keeps static values alive: their ids, which are part of the key, are theirs only as long as they live.
        self._structure = Structure((tuple(args), kwargs), backend.is_passed_by_value)
        self.tensors = list(map(backend.to_tensor, self._structure.tensors))
        signatures = ((backend.signature(tensor), backend.placement(tensor)) for tensor in self.tensors)
        self.key = (self._structure.spec, *signatures, *map(_static_key, self._structure.rest))

    @property
    def objects(self) -> list[Any]:
        """The static values among them."""
        return self._structure.rest

    def call(self, fn: Callable[..., Any], tensors: Tensors) -> Any:
        """Calls a function with these arguments, and with these tensors in place of theirs."""
        args, kwargs = self._structure.filled(map(keras.ops.convert_to_tensor, tensors))
        examples = next((tensor.shape[0] for tensor in tensors if len(tensor.shape)), 1)
        with step_weight(examples):
            return fn(*args, **kwargs)


def results(result: Any) -> Structure:
    """The results of a function; variables and numbers become tensors."""
    return Structure(optree.tree_map(_as_tensor, result))


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, keras.Variable):
        return keras.ops.copy(leaf.value)
    if backend.is_array(leaf) or isinstance(leaf, (bool, int, float, complex)):
        return keras.ops.convert_to_tensor(leaf)
    return leaf


def _static_key(leaf: Any) -> Hashable:
    if isinstance(leaf, (keras.Variable, keras.Layer)) or backend.is_array(leaf):
        return type(leaf), id(leaf)
    if isinstance(leaf, LeftOut):  # Other text in the next batch is no reason to compile again.
        return LeftOut
    return type(leaf), leaf  # 2, 2.0 and True are equal, but a function may treat them differently.
