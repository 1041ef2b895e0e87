"""Layers are built outside of a trace: what `build` computes and a layer keeps has values.

Internals used: `Layer._open_name_scope`, in which Keras builds a layer, at its first call or where `build` is called.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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

    def outside(original: Callable[[Layer], Any]) -> Callable[[Layer], Any]:
        @contextlib.contextmanager
        def building(layer: Layer) -> Iterator[None]:
            with leave(), outside_of_scopes(), _builds.here(True), original(layer):
                yield

        def open_name_scope(layer: Layer) -> Any:
            # Without a `build`, Keras builds the parts of a layer by a call of the whole.
            is_inside = layer.built or is_building() or not has_own_build(layer)
            return (original if is_inside else building)(layer)

        return open_name_scope

    return keras.Layer, "_open_name_scope", outside
