"""PyTorch: layers of Keras are modules of torch, and vice versa, also while a step is traced.

Internals used: `TorchLayer._post_build`, which registers the variables of a layer as torch parameters, and does nothing
in a scope, where variables have no values yet; `get_stateless_scope`, to know whose scope that is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.torch.layer import TorchLayer

from handloom._keras import keras, stored_value
from handloom._util.patch import Patch
from handloom._util.switch import Switch
from handloom.backends.scope import Scope


@contextlib.contextmanager
def parameters_made() -> Iterator[None]:
    """Registers the parameters of layers that are built inside the block, after it."""
    built: list[TorchLayer] = []
    try:
        with _noting_what_is_built, _built.here(built):
            yield
    finally:
        for layer in built:
            layer._post_build()  # Inside another such block, that one does it.


def _note_built(layer: TorchLayer) -> None:
    # In a scope of Keras's own, the layer that builds its parts registers them.
    if isinstance(get_stateless_scope(), Scope):
        _built.get().append(layer)


_built: Switch[list[TorchLayer]] = Switch([])
_noting_what_is_built = Patch((TorchLayer, "_post_build", lambda _: _note_built))


def _call_on_values(self: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
    self.train(training is not False)
    values = {id(stored_value(variable)): variable.value for variable in self.variables}
    named = {name: values.get(id(value), value) for name, value in self.module.named_parameters()}
    return torch.func.functional_call(self.module, named, args, kwargs)


modules_read_variables = Patch((keras.layers.TorchModuleWrapper, "call", lambda _: _call_on_values))
"""Inside, a `TorchModuleWrapper` runs its module on the values of its variables in the open scope."""
