"""The layer that a thread runs, found on its stack: it costs nothing until it is asked for.

Internals used: `sys._current_frames`, the stacks of all threads.
"""

import sys
import traceback
from types import FrameType

from handloom._keras import Layer, keras


def frame_of(thread: int) -> FrameType | None:
    """The innermost frame of a thread by its identifier; `None` once it has ended."""
    return sys._current_frames().get(thread)


def layer_at_work(frame: FrameType | None) -> Layer | None:
    """The innermost layer whose call a frame is part of; `None` if there is none, as in the step of a model."""
    calls = (outer for outer, _ in traceback.walk_stack(frame) if outer.f_code.co_name == "__call__")
    holders = (call.f_locals.get("self") for call in calls)
    return next((holder for holder in holders if isinstance(holder, keras.Layer)), None)


def described(layer: Layer) -> str:
    """A layer in words."""
    return f"the layer {layer.name!r} ({type(layer).__name__})"
