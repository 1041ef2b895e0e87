"""Layers are built outside of a trace: what `build` computes and a layer keeps has values.

Internals used: `Layer._maybe_build`, which builds a layer at its first call, from shapes alone if it has a `build`.
"""

import contextlib
from collections.abc import Callable

from handloom._keras import Layer, has_own_build, keras, outside_of_scopes
from handloom._util.patch import Replacement
from handloom._util.switch import Switch

_builds = Switch(False)

is_building = _builds.get
"""Whether a layer is being built, outside of the trace: what `build` reads and assigns is no part of a step."""


def built_outside(leave: Callable[[], contextlib.AbstractContextManager[None]]) -> Replacement:
    """Makes layers be built outside of the trace, and of the scope for values of variables.

    Args:
        leave: Makes a context that is outside of the backend's trace.
    """

    def built(original: Callable[..., None]) -> Callable[..., None]:
        def maybe_build(layer: Layer, call_spec: object) -> None:
            if layer.built or not has_own_build(layer):  # Without one, Keras builds the parts by a call of the whole.
                original(layer, call_spec)
            else:
                with leave(), outside_of_scopes(), _builds.here(True):
                    original(layer, call_spec)

        return maybe_build

    return keras.Layer, "_maybe_build", built
