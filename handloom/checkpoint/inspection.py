"""The output of `handloom checkpoint`, line by line."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from handloom.checkpoint.format import read_contents, read_manifest, verify
from handloom.checkpoint.load import checkpoints
from handloom.checkpoint.manifest import Manifest
from handloom.errors import CheckpointError

_MOST = 8
"""The elements of a list that is shown in full."""


def listed(path: Path) -> Iterator[str]:
    """A line for each checkpoint at a path, oldest first, without reading the arrays."""
    return (line for _, line in _read_each(path, read_manifest, ""))


def verified(path: Path) -> Iterator[tuple[bool, str]]:
    """Reads every byte of each checkpoint at a path: whether it is whole, and a line that says so."""
    return _read_each(path, verify, "whole, ")


def _read_each(path: Path, read: Callable[[Path], Manifest], finding: str) -> Iterator[tuple[bool, str]]:
    for checkpoint in checkpoints(path):
        try:
            yield True, f"{checkpoint.name}  {finding}{_summary(read(checkpoint))}"
        except CheckpointError as error:
            yield False, f"{checkpoint.name}  DAMAGED: {error}"


def shown(path: Path) -> Iterator[str]:
    """The arrays, then the other contents, of the checkpoint at a path; of several, the newest."""
    checkpoint = checkpoints(path)[-1]
    manifest = verify(checkpoint)
    yield f"{checkpoint}: step {manifest.step}, {_summary(manifest)}"
    width = max(map(len, manifest.tensors), default=0)
    for name, tensor in sorted(manifest.tensors.items()):
        yield f"{name:{width}}  {tensor.dtype:8}  {list(tensor.shape)!s:16}  {tensor.nbytes:,} bytes"
    yield json.dumps(_shortened(read_contents(checkpoint, manifest)), indent=2)


def _shortened(contents: Any) -> Any:
    """The contents with the length of each long list in its place."""
    if isinstance(contents, dict):
        return {name: _shortened(value) for name, value in contents.items()}
    if not isinstance(contents, list):
        return contents
    are_numbers = all(isinstance(value, (int, float)) for value in contents)
    short = [_shortened(value) for value in contents]
    return short if len(short) <= _MOST else f"{len(short)} {'numbers' if are_numbers else 'values'}"


def _summary(manifest: Manifest) -> str:
    metrics = [f"{name}={value:.6g}" for name, value in manifest.metrics.items() if not math.isnan(value)]
    return "  ".join([f"{len(manifest.tensors)} arrays, {manifest.nbytes:,} bytes", *metrics])
