"""What is in a checkpoint, with sizes and checksums; read from a file of which nothing is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from handloom.checkpoint.dtypes import CODES, dtype_of
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

ARRAYS, CONTENTS, MANIFEST = "arrays.safetensors", "contents.json", "manifest.json"
FORMAT = 1
_LARGEST = 1 << 62  # Bytes; with some room before the 64-bit numbers of NumPy and of file systems end.
_DIMENSIONS = 32
_HEAD = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array: its NumPy type, its shape, its bytes (counted from those of the first tensor), and their CRC."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    crc32: int = 0


@dataclasses.dataclass(frozen=True)
class File:
    """One file: its size in bytes and the SHA-256 of all of them."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The table of contents of one checkpoint.

    Attributes:
        step: Which step it was saved at.
        metrics: Name to value, as given to `save`. One that was not finite is NaN.
        tensors: Name to tensor, in the order of their bytes.
        files: Name to file, the manifest itself left out.
    """

    step: int
    metrics: dict[str, float]
    tensors: dict[str, Tensor]
    files: dict[str, File]

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name of each array to its shape and type."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def to_bytes(self) -> bytes:
        """The file, which begins with the SHA-256 of the rest of it."""
        record = {
            "format": FORMAT,
            "step": self.step,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "files": {name: dataclasses.asdict(file) for name, file in self.files.items()},
            "tensors": {name: dataclasses.asdict(tensor) for name, tensor in self.tensors.items()},
        }
        body = encode(record, "The manifest")
        return b'{"sha256":"%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:]

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in a file, every field of it checked.

        Raises:
            CheckpointError: Damaged, from a later Handloom, or with a number that cannot be.
        """
        record = decode(_checked(data), "It")
        if record.get("format") != FORMAT:
            raise CheckpointError(
                "HL523",
                f"It is of format {record.get('format')!r:.40}, and this Handloom reads {FORMAT}. "
                "A later version of Handloom may read it.",
            )
        tensors = {_name(name): _tensor(name, value) for name, value in _object(record, "tensors").items()}
        files = {name: _file(name, value) for name, value in _object(record, "files").items()}
        if files.keys() != {ARRAYS, CONTENTS}:
            raise CheckpointError(
                "HL524", f"It lists {list(files)!r:.200} as files; a checkpoint has {ARRAYS} and {CONTENTS}."
            )
        metrics = {_name(name): _metric(name, value) for name, value in _object(record, "metrics").items()}
        _check_layout(tensors, files[ARRAYS].bytes)
        return cls(_whole(record, "step", "It"), metrics, tensors, files)


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The beginning of a safetensors file that holds these, in this order.

    One manifest has one such beginning, so that a reader compares it and need not parse it.
    """
    table = {
        name: {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.stop],
        }
        for name, tensor in tensors.items()
    }
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # So that the numbers after it are aligned in memory.
    return len(text).to_bytes(8, "little") + text


def check_name(name: str) -> None:
    """Refuses names that would do harm where they are shown, or used as a path by others.

    Raises:
        CheckpointError: Such a name.
    """
    climbs = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
    if not name or len(name) > 4096 or not name.isprintable() or climbs or name == "__metadata__":
        raise CheckpointError(
            "HL525",
            f"{name!r:.100} is no name for an array or a metric: up to 4096 printable characters, no absolute path, "
            "no part '..', and not '__metadata__', which safetensors reserves.",
        )


def _checked(data: bytes) -> bytes:
    head = _HEAD.match(data)
    body = b"{" + data[head.end() :] if head else b""
    if not head or hashlib.sha256(body).hexdigest().encode() != head[1]:
        raise CheckpointError("HL526", "It is damaged: its content is not that of the SHA-256 at its beginning.")
    return body


def _name(name: str) -> str:
    check_name(name)
    return name


def _object(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise CheckpointError("HL527", f"Its field {key!r} is {value!r:.40}, not an object.")
    return value


def _whole(record: Any, key: str, what: str) -> int:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise CheckpointError("HL528", f"{what} has {key}={value!r:.40}, which is no size or number that can be.")
    return value


def _metric(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError("HL529", f"The metric {name!r:.100} is {value!r:.40}, no finite number.")
    return float(value)


def _file(name: str, record: Any) -> File:
    what = f"The file {name!r:.100}"
    digest = record.get("sha256") if isinstance(record, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError("HL530", f"{what} has the SHA-256 {digest!r:.80}, which is none.")
    return File(_whole(record, "bytes", what), digest)


def _tensor(name: str, record: Any) -> Tensor:
    what = f"The tensor {name!r:.100}"
    start, stop, crc32 = (_whole(record, key, what) for key in ("start", "stop", "crc32"))
    dtype, shape = record.get("dtype"), record.get("shape")
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > _DIMENSIONS:
        raise CheckpointError(
            "HL531", f"{what} has the type {dtype!r:.40} and the shape {shape!r:.80}, which cannot be."
        )
    tensor = Tensor(dtype, tuple(_whole({"shape": size}, "shape", what) for size in shape), start, stop, crc32)
    # Sizes of empty arrays too: NumPy would multiply them all the same.
    if math.prod(max(size, 1) for size in tensor.shape) * dtype_of(dtype).itemsize >= _LARGEST:
        raise CheckpointError("HL532", f"{what} has the shape {list(tensor.shape)!r:.80}, too large for any memory.")
    if stop - start != math.prod(tensor.shape) * dtype_of(dtype).itemsize:
        raise CheckpointError(
            "HL533",
            f"{what} has {stop - start} bytes, which is not what the shape {list(tensor.shape)!r:.80} of {dtype} takes.",
        )
    return tensor


def _check_layout(tensors: dict[str, Tensor], size: int) -> None:
    """One after the other from the first byte to the last: so none overlap, and nothing is hidden between."""
    end = 0
    for name, tensor in tensors.items():
        if tensor.start != end:
            raise CheckpointError(
                "HL534", f"The tensor {name!r:.100} begins at byte {tensor.start}, not at {end} after those before."
            )
        end = tensor.stop
    expected = len(header(tensors)) + end
    if size != expected:
        raise CheckpointError("HL535", f"{ARRAYS} is said to have {size} bytes; its tensors make it {expected}.")
