"""What is saved: a state as arrays and JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from handloom.errors import CheckpointError


def take(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Copies a state: arrays by name, and everything else as JSON values."""
    arrays: dict[str, np.ndarray] = {}
    contents: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            arrays |= {f"{name}.{key}": np.array(array) for key, array in value.items()}
        else:
            contents[name] = value.state()
    return arrays, contents


def check(state: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Refuses a checkpoint of something else, before any array is read.

    Raises:
        CheckpointError: Names that are missing, not expected, or of another shape.
    """
    mine = {name: (array.shape, array.dtype.name) for name, array in take(state)[0].items()}
    for name in mine.keys() | shapes.keys():
        if mine.get(name) != shapes.get(name):
            raise CheckpointError(f"{name!r} is {shapes.get(name)} in the checkpoint and {mine.get(name)} here.")


def put(state: Mapping[str, Any], arrays: dict[str, np.ndarray], contents: dict[str, Any]) -> None:
    """Gives a state what was taken from one like it."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            for key, array in value.items():
                array[...] = arrays[f"{name}.{key}"]
        else:
            value.restore(contents[name])
