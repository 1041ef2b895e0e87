"""PyTorch: layers of Keras are modules of torch, and vice versa, also while a step is traced.

Internals used: `unset_fake_temporarily` and `disable_proxy_modes_tracing`, which pause a trace; `core.get_device` and
`device_scope`, because Keras computes shapes on the device "meta", which has no values; `TorchLayer._post_build`, which
registers the variables of a layer as torch parameters, and does nothing in a scope, where variables have no values yet;
`get_stateless_scope`, to know whose scope that is; `TorchLayer.named_parameters`, which `zero_grad` asks.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from keras.src.backend.torch.layer import TorchLayer
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from handloom._keras import core, get_stateless_scope, keras, stored_value
from handloom._util.patch import Patch
from handloom._util.switch import Switch
from handloom.backends.building import built_outside
from handloom.backends.scope import Scope
from handloom.backends.torch.fake import is_traced
from handloom.backends.torch.operators import operators_of_keras


@contextlib.contextmanager
def parameters_made() -> Iterator[None]:
    """Builds layers outside of the trace; registers the parameters of those built inside the block, after it."""
    built: list[TorchLayer] = []
    try:
        with in_steps, _noting_what_is_built, _built.here(built):
            yield
    finally:
        for layer in built:
            layer._post_build()  # Inside another such block, that one does it.


@contextlib.contextmanager
def outside() -> Iterator[None]:
    device = core.device_scope(core.DEFAULT_DEVICE if core.get_device() == "meta" else core.get_device())
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.no_grad(), device:
        yield


in_steps = Patch(built_outside(outside), *operators_of_keras)


def _noting_built(original: Callable[[TorchLayer], None]) -> Callable[[TorchLayer], None]:
    def note(layer: TorchLayer) -> None:
        # In a scope of Keras's own, the layer that builds its parts registers them.
        if isinstance(get_stateless_scope(), Scope):
            _built.get().append(layer)
        else:
            original(layer)

    return note


_built: Switch[list[TorchLayer]] = Switch([])
_noting_what_is_built = Patch((TorchLayer, "_post_build", _noting_built))


def _call_on_values(self: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
    self.train(training is not False)
    values = {id(stored_value(variable)): variable.value for variable in self.variables}
    named = {name: values.get(id(value), value) for name, value in self.module.named_parameters()}
    return torch.func.functional_call(self.module, named, args, kwargs)


modules_read_variables = Patch((keras.layers.TorchModuleWrapper, "call", lambda _: _call_on_values))
"""Inside, a `TorchModuleWrapper` runs its module on the values of its variables in the open scope."""


def _named_stand_ins(_: Callable[..., Any]) -> Callable[..., Any]:
    def named_parameters(
        self: TorchLayer,
        prefix: str = "",
        recurse: bool = True,  # noqa: ARG001  As torch calls it.
        remove_duplicate: bool = True,  # noqa: ARG001
    ) -> Iterator[tuple[str, torch.Tensor]]:
        distinct = {id(variable): variable for variable in self.variables}
        for variable in distinct.values():
            yield f"{prefix}.{variable.path}" if prefix else variable.path, variable.value

    return named_parameters


parameters_in_trace = Patch((TorchLayer, "named_parameters", _named_stand_ins), when=is_traced)
"""Inside, the parameters of a layer are those of the trace: `zero_grad` clears their gradients."""
