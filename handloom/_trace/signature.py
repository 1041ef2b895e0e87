"""Signatures of compiled functions as text, and how two of them differ."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import optree

from handloom.backends import backend

Signature: TypeAlias = dict[str, str]
"""Each leaf of the arguments by name: `{"x": ": float32[32,8]", "training": "=True"}`."""


def signature_of(python_function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Signature:
    """The signature of a call."""
    try:
        bound = inspect.signature(python_function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # A wrong call, which raises its own error; or a function without a signature.
        bound = {f"args[{index}]": argument for index, argument in enumerate(args)} | kwargs
    return {
        name + "".join(f"[{part!r}]" for part in path): _described(leaf)
        for name, argument in bound.items()
        for path, leaf in zip(*optree.tree_flatten_with_path(argument)[:2], strict=True)
    }


def as_text(signature: Signature) -> str:
    """The signature as text: `x: float32[32,8], training=True`."""
    return ", ".join(f"{name}{description}" for name, description in signature.items())


def reason_for(signature: Signature, others: Iterable[Signature]) -> str:
    """Why a signature needs a version of its own: how it differs from the most similar other."""
    differences: list[list[str]] = [_differences(other, signature) for other in others]
    if not differences:
        return "first call"
    fewest: list[str] = min(differences, key=len)
    return "; ".join(fewest) or "another structure, type or strategy of the same arguments"


def static_values(name: str, signatures: Iterable[Signature]) -> list[str]:
    """The distinct Python values of an argument."""
    return sorted({signature[name][1:] for signature in signatures if signature.get(name, "").startswith("=")})


def differing_in_shapes(signature: Signature, signatures: Iterable[Signature]) -> list[Signature]:
    """The signatures that are equal to one apart from shapes; with itself, if it is among them."""
    return [other for other in signatures if _without_shapes(other) == _without_shapes(signature)]


def shapes_in(signatures: Sequence[Signature]) -> dict[str, list[str]]:
    """The distinct shapes of each argument that has several, in their order."""
    shapes = {name: [signature[name].lstrip(": ") for signature in signatures] for name in signatures[0]}
    return {name: list(dict.fromkeys(found)) for name, found in shapes.items() if len(set(found)) > 1}


def _without_shapes(signature: Signature) -> Signature:
    return {
        name: _SHAPE.sub("", description) if description.startswith(":") else description
        for name, description in signature.items()
    }


_SHAPE = re.compile(r"\d+ stored|\[.*\]$")


def _described(leaf: Any) -> str:
    if not backend.is_array(leaf):
        return f"={leaf!r}"
    shape, dtype = backend.signature(backend.to_tensor(leaf))
    return f": {dtype}[{','.join(map(str, shape))}]"


def _differences(old: Signature, new: Signature) -> list[str]:
    differing = [name for name in new if name in old and old[name] != new[name]]
    changed = [f"{name}: {old[name].lstrip(':= ')} -> {new[name].lstrip(':= ')}" for name in differing]
    added = [f"{name}{new[name]} is new" for name in new if name not in old]
    return [*changed, *added, *(f"{name}{old[name]} is gone" for name in old if name not in new)]
