"""What is in a checkpoint, with sizes and checksums; read from a file of which nothing is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from handloom.checkpoint.dtypes import CODES, dtype_of
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

ARRAYS, CONTENTS, MANIFEST = "arrays.safetensors", "contents.json", "manifest.json"
FORMAT = 2
_ARRAYS_OF_SEVERAL = re.compile(r"arrays-\d{5}-of-\d{5}\.safetensors")
_LARGEST = 1 << 62  # Bytes; with some room before the 64-bit numbers of NumPy and of file systems end.
_DIMENSIONS = 32
_HEAD = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


def arrays_file(index: int, count: int) -> str:
    """The name of a file of arrays, of so many, counted from 0."""
    return ARRAYS if count == 1 else f"arrays-{index + 1:05}-of-{count:05}.safetensors"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an array, or all of it, that lies in one file.

    Attributes:
        file: The name of the file.
        start: Its first byte there, counted from the first of the first array.
        stop: Where it ends.
        offset: Where its first element stands in the array, one index an axis.
        shape: Its shape.
        crc32: The CRC-32 of its bytes.
    """

    file: str
    start: int
    stop: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int = 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where it stands in the array."""
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offset, self.shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array: its NumPy type, its shape, and its pieces, of which each of its elements is in one."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is saved beside arrays: the size of its file in bytes, and its SHA-256."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The table of contents of one checkpoint.

    Attributes:
        step: Which step it was saved at.
        metrics: Name to value, as given to `save`. One that was not finite is NaN.
        tensors: Name to tensor.
        files: Name of each file of arrays to its size in bytes.
        contents: What is saved beside arrays.
    """

    step: int
    metrics: dict[str, float]
    tensors: dict[str, Tensor]
    files: dict[str, int]
    contents: Contents

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name of each array to its shape and type."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """The size of all files but its own."""
        return sum(self.files.values()) + self.contents.bytes

    def to_bytes(self) -> bytes:
        """The file, which begins with the SHA-256 of the rest of it."""
        record = {
            "format": FORMAT,
            "step": self.step,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "files": self.files,
            "contents": dataclasses.asdict(self.contents),
            "tensors": {name: dataclasses.asdict(tensor) for name, tensor in self.tensors.items()},
        }
        body = encode(_listed(record), "The manifest")
        return b'{"sha256":"%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:]

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in a file, every field of it checked.

        Raises:
            CheckpointError: Damaged, from a later Handloom, or with a number that cannot be.
        """
        record = decode(_checked(data), "It")
        record = _of_format_1(record) if record.get("format") == 1 else record
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"HL523: It is of format {record.get('format')!r:.40}, and this Handloom reads 1 to {FORMAT}. "
                "A later version of Handloom may read it.",
            )
        tensors = {_name(name): _tensor(name, value) for name, value in _object(record, "tensors").items()}
        files = {_file(name): _whole(record["files"], name, "It") for name in _object(record, "files")}
        metrics = {_name(name): _metric(name, value) for name, value in _object(record, "metrics").items()}
        _check_layout(tensors, files)
        return cls(_whole(record, "step", "It"), metrics, tensors, files, _contents(_object(record, "contents")))


def in_order(tensors: Mapping[str, Tensor], file: str) -> list[tuple[str, Piece]]:
    """The pieces in a file with the names of their arrays, in the order of their bytes."""
    found = [(name, piece) for name, tensor in tensors.items() for piece in tensor.pieces if piece.file == file]
    return sorted(found, key=lambda item: (item[1].start, item[1].stop, item[0], item[1].offset))


def header(tensors: Mapping[str, Tensor], file: str) -> bytes:
    """The beginning of a safetensors file of these arrays.

    One manifest has one such beginning, so that a reader compares it and need not parse it.
    """
    table = {
        _name_in_file(name, piece, tensors[name]): {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(piece.shape),
            "data_offsets": [piece.start, piece.stop],
        }
        for name, piece in in_order(tensors, file)
    }
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # So that the numbers after it are aligned in memory.
    return len(text).to_bytes(8, "little") + text


def _name_in_file(name: str, piece: Piece, tensor: Tensor) -> str:
    """As `kernel`, or `kernel[0:4,8:16]` for a part of it."""
    if piece.shape == tensor.shape:
        return name
    return f"{name}[{','.join(f'{part.start}:{part.stop}' for part in piece.slices)}]"


def check_name(name: str) -> None:
    """Refuses names that would do harm where they are shown, or used as a path by others.

    Raises:
        CheckpointError: Such a name.
    """
    climbs = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
    if not name or len(name) > 4096 or not name.isprintable() or climbs or name == "__metadata__":
        raise CheckpointError(
            f"HL525: {name!r:.100} is no name for an array or a metric: up to 4096 printable characters, no absolute path, "
            "no part '..', and not '__metadata__', which safetensors reserves.",
        )


def _listed(value: Any) -> Any:
    """With lists for tuples."""
    if isinstance(value, dict):
        return {name: _listed(inner) for name, inner in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _checked(data: bytes) -> bytes:
    head = _HEAD.match(data)
    body = b"{" + data[head.end() :] if head else b""
    if not head or hashlib.sha256(body).hexdigest().encode() != head[1]:
        raise CheckpointError("HL526: It is damaged: its content is not that of the SHA-256 at its beginning.")
    return body


def _of_format_1(record: dict[str, Any]) -> dict[str, Any]:
    """What format 1 says, in the words of this one: it has one file of arrays, and each array lies in one piece."""
    files = _object(record, "files")
    tensors = {}
    for name in _object(record, "tensors"):
        tensor = _object(record["tensors"], name)
        shape = tensor.get("shape")
        placed = {"file": ARRAYS, "shape": shape, "offset": [0] * len(shape) if isinstance(shape, list) else None}
        tensors[name] = tensor | {"pieces": [tensor | placed]}
    arrays = {ARRAYS: _object(files, ARRAYS).get("bytes")}
    return record | {"format": FORMAT, "files": arrays, "contents": _object(files, CONTENTS), "tensors": tensors}


def _name(name: str) -> str:
    check_name(name)
    return name


def _file(name: str) -> str:
    if name != ARRAYS and not _ARRAYS_OF_SEVERAL.fullmatch(name):
        raise CheckpointError(f"HL524: It lists {name!r:.200} as a file of arrays.")
    return name


def _object(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"HL527: Its field {key!r:.100} is {value!r:.40}, not an object.")
    return value


def _whole(record: Any, key: str, what: str) -> int:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise CheckpointError(f"HL528: {what} has {key}={value!r:.40}, which is no size or number that can be.")
    return value


def _sizes(record: Any, key: str, what: str) -> tuple[int, ...]:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, list) or len(value) > _DIMENSIONS:
        raise CheckpointError(f"HL531: {what} has {key}={value!r:.80}, which cannot be.")
    return tuple(_whole({key: size}, key, what) for size in value)


def _metric(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError(f"HL529: The metric {name!r:.100} is {value!r:.40}, no finite number.")
    return float(value)


def _contents(record: dict[str, Any]) -> Contents:
    digest = record.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(f"HL530: {CONTENTS} has the SHA-256 {digest!r:.80}, which is none.")
    return Contents(_whole(record, "bytes", CONTENTS), digest)


def _tensor(name: str, record: Any) -> Tensor:
    what = f"The array {name!r:.100}"
    shape, dtype, pieces = _sizes(record, "shape", what), record.get("dtype"), record.get("pieces")
    if not isinstance(dtype, str) or not isinstance(pieces, list):
        raise CheckpointError(f"HL545: {what} has the type {dtype!r:.40} and pieces={pieces!r:.80}, which cannot be.")
    # Sizes of empty arrays too: NumPy would multiply them all the same.
    if math.prod(max(size, 1) for size in shape) * dtype_of(dtype).itemsize >= _LARGEST:
        raise CheckpointError(f"HL532: {what} has the shape {list(shape)!r:.80}, too large for any memory.")
    tensor = Tensor(dtype, shape, tuple(_piece(what, dtype, piece) for piece in pieces))
    if not _is_grid(tensor):
        raise CheckpointError(f"HL546: {what} has pieces that do not make up the shape {list(shape)!r:.80}.")
    return tensor


def _piece(what: str, dtype: str, record: Any) -> Piece:
    shape, offset = _sizes(record, "shape", what), _sizes(record, "offset", what)
    start, stop, crc32 = (_whole(record, key, what) for key in ("start", "stop", "crc32"))
    if stop - start != math.prod(shape) * dtype_of(dtype).itemsize:
        raise CheckpointError(
            f"HL533: {what} has {stop - start} bytes, which is not what the shape {list(shape)!r:.80} of {dtype} takes.",
        )
    return Piece(str(record.get("file")), start, stop, offset, shape, crc32)


def _is_grid(tensor: Tensor) -> bool:
    """Whether pieces make up an array, each of its elements once.

    They do in every way of sharding: it is cut along axes, and a piece is what lies between two cuts of each axis.
    """
    if any(not len(piece.shape) == len(piece.offset) == len(tensor.shape) for piece in tensor.pieces):
        return False
    parts = [
        sorted({(piece.offset[axis], piece.offset[axis] + piece.shape[axis]) for piece in tensor.pieces})
        for axis in range(len(tensor.shape))
    ]
    tiled = all(_tile(axis, size) for axis, size in zip(parts, tensor.shape, strict=True))
    places = {piece.offset for piece in tensor.pieces}
    return tiled and len(places) == len(tensor.pieces) == math.prod(map(len, parts))


def _tile(parts: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether parts of an axis follow each other from its begin to its end."""
    begins, ends = [begin for begin, _ in parts], [end for _, end in parts]
    return [*begins, size] == [0, *ends]


def _check_layout(tensors: dict[str, Tensor], files: dict[str, int]) -> None:
    """In each file one after the other from the first byte to the last: so none overlap, and nothing is hidden."""
    named = {piece.file for tensor in tensors.values() for piece in tensor.pieces}
    if not named <= files.keys():
        raise CheckpointError(f"HL550: Its arrays are in {sorted(named)!r:.200}, its files are {list(files)!r:.200}.")
    for file, size in files.items():
        end = 0
        for name, piece in in_order(tensors, file):
            if piece.start != end:
                raise CheckpointError(
                    f"HL534: The array {name!r:.100} begins at byte {piece.start}, not at {end} after those before."
                )
            end = piece.stop
        expected = len(header(tensors, file)) + end
        if size != expected:
            raise CheckpointError(f"HL535: {file} is said to have {size} bytes; its arrays make it {expected}.")
