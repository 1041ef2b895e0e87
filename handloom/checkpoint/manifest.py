"""The manifest of a checkpoint: its arrays and files, with sizes and checksums. One that is read is not trusted."""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

from handloom.checkpoint.dtypes import CODES, dtype_of
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

ARRAYS, CONTENTS, MANIFEST = "arrays.safetensors", "contents.json", "manifest.json"
FORMAT = 2
_ARRAYS = re.compile(r"arrays(-\d{5}-of-\d{5})?\.safetensors")
_LARGEST = 1 << 62  # Bytes. Leaves room below the 64-bit limits of NumPy and of file systems.
_DIMENSIONS = 32
_HEAD = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


def arrays_file(index: int, count: int) -> str:
    """The name of one of `count` files of arrays; `index` counts from 0."""
    return ARRAYS if count == 1 else f"arrays-{index + 1:05}-of-{count:05}.safetensors"


@dataclasses.dataclass
class Piece:
    """A part of an array, or all of it, in one file.

    Attributes:
        file: The name of the file.
        offset: The index of its first element in the array, one number an axis.
        shape: Its shape.
        crc32: The CRC-32 of its bytes; 0 until they are written.
    """

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int = 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """Its place in the array."""
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offset, self.shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array: its NumPy dtype, its shape, and its pieces, which together hold each element once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Contents:
    """The file of JSON values: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The table of contents of one checkpoint.

    Attributes:
        step: The step at which it was saved.
        metrics: Name to value, as given to `save`. Values that were not finite are NaN.
        tensors: Name to tensor.
        files: The name of each file of arrays to its size in bytes.
        contents: The file of JSON values.
    """

    step: int
    metrics: dict[str, float]
    tensors: dict[str, Tensor]
    files: dict[str, int]
    contents: Contents

    @property
    def nbytes(self) -> int:
        """The size of all files except the manifest."""
        return sum(self.files.values()) + self.contents.bytes

    def layout(self, file: str) -> Iterator[tuple[str, Piece, int, int]]:
        """The pieces in a file, in order: the name of the array, the piece, its first byte, the byte after its last.

        Large elements come first, so that all are aligned in memory; then the order is by name and offset.
        """
        pieces = [(name, part) for name, tensor in self.tensors.items() for part in tensor.pieces if part.file == file]
        itemsize = {name: dtype_of(tensor.dtype).itemsize for name, tensor in self.tensors.items()}
        stop = 0
        for name, piece in sorted(pieces, key=lambda item: (-itemsize[item[0]], item[0], item[1].offset)):
            start, stop = stop, stop + math.prod(piece.shape) * itemsize[name]
            yield name, piece, start, stop

    def header(self, file: str) -> bytes:
        """The header of a safetensors file with these arrays.

        A manifest determines it, so that a reader compares it and need not parse it.
        """
        table = {}
        for name, piece, *offsets in self.layout(file):
            dtype, title = CODES[self.tensors[name].dtype], _name_in_file(name, piece, self.tensors[name])
            table[title] = {"dtype": dtype, "shape": list(piece.shape), "data_offsets": offsets}
        text = json.dumps(table, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)  # Aligns the arrays after it in memory.
        return len(text).to_bytes(8, "little") + text

    def size_of(self, file: str) -> int:
        """The size of a file of arrays, in bytes."""
        return len(self.header(file)) + max((stop for *_, stop in self.layout(file)), default=0)

    def to_bytes(self) -> bytes:
        """The bytes of the file, which begins with the SHA-256 of the rest."""
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        body = encode({"format": FORMAT} | dataclasses.asdict(self) | {"metrics": metrics}, "The manifest")
        return b'{"sha256":"%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads the bytes of a file and checks every field.

        Raises:
            CheckpointError: The manifest is damaged, of a later format, or contradicts itself.
        """
        record = decode(_verified(data), "The manifest")
        if record.get("format") == 1:
            record = _of_format_1(record)
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"HL523: The format is {record.get('format')!r:.40}; this Handloom reads formats 1 to {FORMAT}.",
                fix="A later version of Handloom may read it.",
            )
        found: Manifest = _read(cls, record, "The manifest")
        for name, value in found.metrics.items():
            _valid(value, _METRIC, "The manifest", check_name(name))
        metrics = {name: math.nan if value is None else float(value) for name, value in found.metrics.items()}
        tensors = {check_name(name): _tensor(name, value) for name, value in found.tensors.items()}
        manifest = cls(found.step, metrics, tensors, found.files, _read(Contents, found.contents, CONTENTS))
        _check_files(manifest)
        return manifest


def _name_in_file(name: str, piece: Piece, tensor: Tensor) -> str:
    """`kernel`, or `kernel[0:4,8:16]` for a part of it."""
    if piece.shape == tensor.shape:
        return name
    return f"{name}[{','.join(f'{part.start}:{part.stop}' for part in piece.slices)}]"


def check_name(name: str) -> str:
    """Returns the name of an array or a metric if it is harmless in a terminal, and as a path in another program.

    Raises:
        CheckpointError: It is not.
    """
    climbs = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
    if not name or len(name) > 4096 or not name.isprintable() or climbs or name == "__metadata__":
        raise CheckpointError(
            f"HL525: {name!r:.100} is not a valid name for an array or a metric.",
            fix="Use 1 to 4096 printable characters that are not an absolute path, contain no part '..', and are not "
            "'__metadata__', which safetensors reserves.",
        )
    return name


def _verified(data: bytes) -> bytes:
    """The JSON text of a manifest, without the checksum at its beginning."""
    head = _HEAD.match(data)
    body = b"{" + data[head.end() :] if head else b""
    if not head or hashlib.sha256(body).hexdigest().encode() != head[1]:
        raise CheckpointError("HL526: The manifest is damaged: it does not match the SHA-256 at its beginning.")
    return body


# A description of a valid value, and its check; for each field of a record, by its name.
_Check = tuple[str, Callable[[Any], bool]]
_OBJECT: _Check = "an object", lambda value: isinstance(value, dict)
_SIZE: _Check = f"a whole number from 0 to {_LARGEST - 1}", lambda value: type(value) is int and 0 <= value < _LARGEST
_SIZES: _Check = (
    f"a list of at most {_DIMENSIONS} whole numbers",
    lambda value: isinstance(value, list) and len(value) <= _DIMENSIONS and all(map(_SIZE[1], value)),
)
_METRIC: _Check = (
    "a finite number or null",
    lambda value: value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max),
)
_FIELDS: dict[str, _Check] = {
    **dict.fromkeys(("step", "bytes", "crc32"), _SIZE),
    **dict.fromkeys(("offset", "shape"), _SIZES),
    **dict.fromkeys(("contents", "files", "metrics", "tensors"), _OBJECT),
    "dtype": (f"one of {', '.join(CODES)}", lambda value: isinstance(value, str) and value in CODES),
    "file": ("a string", lambda value: isinstance(value, str)),
    "pieces": ("a list", lambda value: isinstance(value, list)),
    "sha256": ("64 hexadecimal digits", lambda value: re.fullmatch("[0-9a-f]{64}", str(value)) is not None),
}


def _read(kind: Any, record: Any, of: str) -> Any:
    """A dataclass from a record that has a field for each of its own."""
    return kind(**{field.name: _field(record, field.name, of) for field in dataclasses.fields(kind)})


def _field(record: Any, name: str, of: str) -> Any:
    value = _valid(record.get(name) if isinstance(record, dict) else None, _FIELDS[name], of, name)
    return tuple(value) if isinstance(value, list) else value


def _valid(value: Any, check: _Check, of: str, name: str) -> Any:
    expected, is_valid = check
    if not is_valid(value):
        raise CheckpointError(f"HL528: {of} has {name[:100]}={value!r:.80}; expected {expected}.")
    return value


def _of_format_1(record: dict[str, Any]) -> dict[str, Any]:
    """A record of format 1, which has one file of arrays, with each array in one piece, in the terms of format 2."""
    files, tensors = _field(record, "files", "The manifest"), {}
    for name, tensor in _field(record, "tensors", "The manifest").items():
        shape = _field(tensor, "shape", f"The array {name!r:.100}")
        tensors[name] = tensor | {"pieces": [tensor | {"file": ARRAYS, "offset": [0] * len(shape)}]}
    arrays = {ARRAYS: _field(files.get(ARRAYS), "bytes", ARRAYS)}
    return record | {"format": FORMAT, "files": arrays, "contents": files.get(CONTENTS), "tensors": tensors}


def _tensor(name: str, record: Any) -> Tensor:
    of = f"The array {name!r:.100}"
    tensor: Tensor = _read(Tensor, record, of)
    # Empty axes count as 1: NumPy multiplies the others all the same.
    if math.prod(max(size, 1) for size in tensor.shape) * dtype_of(tensor.dtype).itemsize >= _LARGEST:
        raise CheckpointError(f"HL532: {of} has shape={tensor.shape!r:.80}, which is too large for any memory.")
    pieces: tuple[Piece, ...] = tuple(_read(Piece, piece, of) for piece in tensor.pieces)
    if not _is_grid(tensor.shape, pieces):
        raise CheckpointError(f"HL546: {of} has pieces that do not make up its shape {tensor.shape!r:.80}.")
    return dataclasses.replace(tensor, pieces=pieces)


def _is_grid(shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> bool:
    """Whether pieces hold each element of an array once.

    All ways of sharding cut an array along its axes: the pieces lie between two neighboring cuts of each axis.
    """
    if any(not len(piece.shape) == len(piece.offset) == len(shape) for piece in pieces):
        return False
    count = 1
    for axis, size in enumerate(shape):
        parts = sorted({(piece.offset[axis], piece.offset[axis] + piece.shape[axis]) for piece in pieces})
        if [begin for begin, _ in parts] + [size] != [0] + [end for _, end in parts]:
            return False
        count *= len(parts)
    return count == len(pieces) == len({piece.offset for piece in pieces})


def _check_files(manifest: Manifest) -> None:
    named = {piece.file for tensor in manifest.tensors.values() for piece in tensor.pieces}
    if not named <= manifest.files.keys():
        raise CheckpointError(f"HL550: Arrays are in {sorted(named)!r:.200}; files are {list(manifest.files)!r:.200}.")
    for file, size in manifest.files.items():
        if not _ARRAYS.fullmatch(file):
            raise CheckpointError(f"HL524: {file!r:.200} is listed, which is not a name for a file of arrays.")
        expected = manifest.size_of(file)
        if _valid(size, _SIZE, "The manifest", file) != expected:
            raise CheckpointError(f"HL535: {file} is listed with {size} bytes; its arrays take {expected}.")
