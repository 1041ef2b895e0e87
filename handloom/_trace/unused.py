"""Warnings about sample weights, masks and losses that a step was given and does not use."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import optree

from handloom._keras import Layer, Tensor, get_keras_mask, keras, set_keras_mask
from handloom._trace.losses import UncountedLosses
from handloom._trace.observe import Observer
from handloom._trace.python_state import PythonState
from handloom._util.findings import warn
from handloom.backends import backend
from handloom.backends.dependencies import Dependencies

WEIGHTS = "the sample weights"
"""The mark on sample weights, by which it is known whether a step uses them (see `Backend.marked`)."""

MASK, OWN_MASK = "the mask", "the mask computed by compute_mask of"
"""How the marks of masks begin: those of outputs, and those that the step computes by `layer.compute_mask`."""

_SELECTING = {"where", "equal", "not_equal", "greater", "greater_equal", "less", "less_equal", "sign", "minimum"}
_WORDS = ("mask", "padd", "valid", "real", "lengths")


class Marks(Observer):
    """Marks the masks of a step."""

    def layer_called(self, layer: Layer, outputs: Any) -> None:
        for output in keras.tree.flatten(outputs):
            mask = get_keras_mask(output)
            if mask is not None:
                set_keras_mask(output, backend.marked(mask, f"{MASK} of the output of {layer.name!r}"))

    def mask_computed(self, layer: Layer, mask: Tensor) -> Tensor:
        return backend.marked(mask, f"{OWN_MASK} {layer.name!r}")


class Forgotten:
    """What a compiled function that applies an optimizer forgets, apart from the loops of Handloom."""

    def __init__(self) -> None:
        self._losses = UncountedLosses()
        self.observers = Marks(), self._losses

    def marking(self, function: Callable[..., Any], converted: Callable[..., Any]) -> Callable[..., Any]:
        """The converted function, with the argument `sample_weight` marked if the function has one."""
        with contextlib.suppress(TypeError, ValueError):  # A builtin without a signature.
            signature = inspect.signature(function)
            if "sample_weight" in signature.parameters:
                return functools.partial(_with_marked_weights, converted, signature)
        return converted

    def found(self, dependencies: Dependencies, function: Callable[..., Any]) -> list[str]:
        """What it forgets, by the names that `warn_of_unused` takes."""
        trains = self._losses.applies
        return [*unused_in(dependencies, function), *self._losses.descriptions(of_trained=True)] if trains else []


def _with_marked_weights(
    function: Callable[..., Any], signature: inspect.Signature, /, *args: Any, **kwargs: Any
) -> Any:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    bound.arguments["sample_weight"] = marked_weights(bound.arguments["sample_weight"])
    return function(*bound.args, **bound.kwargs)


def marked_weights(sample_weight: Any) -> Any:
    """Sample weights, marked."""
    return optree.tree_map(_marked, sample_weight)


def _marked(leaf: Any) -> Any:
    # Arguments that are arrays have become tensors; other arrays are constants.
    is_tensor = backend.is_array(leaf) and not isinstance(leaf, (np.ndarray, np.generic))
    return backend.marked(leaf, WEIGHTS) if is_tensor else leaf


def unused_in(dependencies: Dependencies, function: Callable[..., Any]) -> list[str]:
    """The marks that a program does not use; no masks of outputs if its function masks by itself."""
    unused = dependencies.unused
    if not any(mark.startswith(MASK) for mark in unused):
        return unused
    own = [mark for mark in dependencies.marks if mark.startswith(OWN_MASK)]
    masks = any(mark not in unused for mark in own) if own else _may_mask(function)
    return [mark for mark in unused if not (masks and mark.startswith(MASK))]


def _may_mask(function: Callable[..., Any]) -> bool:
    """Whether a function compares values, as in `y != 0`, or has a name for a mask: it may mask by hand."""
    names = PythonState(function, metrics=False).names
    found = names.read.keys() | names.local
    return names.compares or bool(found & _SELECTING) or any(word in name for word in _WORDS for name in found)


def warn_of_unused(step: str, mark: str) -> None:
    """Warns that a step does not use a marked value. Values with other marks may be unused."""
    if mark == WEIGHTS:
        warn(
            f"HL204: {step} does not use the sample weights.",
            "Every example counts alike in its losses and metrics.",
            "Pass the weights on, for example compute_loss(x, y, y_pred, sample_weight), or do not give any.",
        )
    elif mark.startswith(MASK):
        warn(
            f"HL252: {step} does not use {mark}.",
            "Masked values count like all others.",
            "Call a loss object, such as keras.losses.MeanSquaredError(), with y_pred exactly as the layer returned "
            "it: the functions in keras.losses ignore masks. Make a loss of your own a subclass of keras.losses.Loss. "
            'If the step masks in another way, silence this warning: hl.checks.silence("HL252").',
        )
    elif mark.startswith(("the losses added by", "the regularizer of")):
        warn(
            f"HL253: {step} does not use {mark}.",
            "No loss that the step minimizes includes that.",
            "Use minimize(), which includes it, or add sum(layer.losses) to the loss.",
        )
