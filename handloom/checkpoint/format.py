"""A checkpoint as bytes: files in a directory, written from arrays and JSON values, read with all checks.

    arrays.safetensors   the arrays, as any reader of safetensors takes them; or several such files, each with parts of
                         arrays: arrays-00001-of-00002.safetensors
    contents.json        everything else
    manifest.json        the step, the metrics, the sizes of the files, each array with a CRC-32 of each of its parts

The safetensors file is written and read here and not by its library: which one can be told neither to read into given
memory nor from an open file, and to write without a second copy of the arrays only by addresses in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handloom._util.shard import Shard
from handloom.checkpoint import filesystem
from handloom.checkpoint.dtypes import as_bytes, dtype_of, plain
from handloom.checkpoint.manifest import (
    CONTENTS,
    MANIFEST,
    Contents,
    Manifest,
    Piece,
    Tensor,
    arrays_file,
    check_name,
    header,
    in_order,
)
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

# Bytes; some 200,000 arrays, and a history of as many epochs. Without an end, a file could fill the memory.
_LARGEST = 64 << 20


class Draft:
    """A checkpoint that is not on the disk yet.

    Args:
        step: Which step it is of.
        parts: What each file of arrays is to hold: name to the shards of that array. Together they are whole arrays.
            They must not change until they have been written.
        contents: JSON values.
        metrics: Name to value.

    Attributes:
        bytes: How much room it needs, within a few kilobytes.

    Raises:
        CheckpointError: Something in it that cannot be saved, by name.
    """

    def __init__(
        self,
        step: int,
        parts: Sequence[Mapping[str, Sequence[Shard]]],
        contents: dict[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        for name in (*(name for part in parts for name in part), *metrics):
            check_name(name)
        self.step = step
        self.metrics = dict(metrics)
        self._files = {arrays_file(index, len(parts)): part for index, part in enumerate(parts)}
        self._placed = {file: list(_laid_out(file, part)) for file, part in self._files.items()}
        self._contents = encode(contents, "contents")
        if len(self._contents) > _LARGEST:
            raise CheckpointError(
                f"HL511: The contents take {len(self._contents):,} bytes as JSON, of {_LARGEST:,} that they may. "
                "What is large belongs in arrays.",
            )
        manifest = self._manifest()
        self.bytes = manifest.nbytes + len(manifest.to_bytes()) + 4096

    def write(self, directory: Path) -> None:
        """Writes the files into an empty directory, to the disk, and reads them back from there.

        Raises:
            CheckpointError: What is read is not what was written, by name.
        """
        tensors = self._manifest().tensors
        for file, placed in self._placed.items():
            begin = header(tensors, file)
            with filesystem.creating(directory / file) as out:
                filesystem.write(out, memoryview(begin))
                self._placed[file] = [
                    (name, dataclasses.replace(piece, crc32=_written(out, as_bytes(array))), array)
                    for name, piece, array in placed
                ]
        manifest = self._manifest()
        for file, data in ((CONTENTS, self._contents), (MANIFEST, manifest.to_bytes())):
            with filesystem.creating(directory / file) as out:
                filesystem.write(out, memoryview(data))
        verify(directory, from_disk=True)

    def _manifest(self) -> Manifest:
        contents = Contents(len(self._contents), hashlib.sha256(self._contents).hexdigest())
        tensors = _tensors(item for placed in self._placed.values() for item in placed)
        files = {
            file: len(header(tensors, file)) + sum(array.nbytes for _, _, array in placed)
            for file, placed in self._placed.items()
        }
        return Manifest(self.step, self.metrics, tensors, files, contents)


def _laid_out(file: str, part: Mapping[str, Sequence[Shard]]) -> Iterator[tuple[str, Piece, np.ndarray]]:
    """Where each shard lies in its file. Large elements come first, so that all are aligned in memory."""
    arrays = [(name, shard.offset, plain(name, shard.value)) for name, shards in part.items() for shard in shards]
    end = 0
    for name, offset, array in sorted(arrays, key=lambda item: (-item[2].itemsize, *item[:2])):
        yield name, Piece(file, end, end + array.nbytes, offset, array.shape), array
        end += array.nbytes


def _tensors(placed: Iterable[tuple[str, Piece, np.ndarray]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, piece, array in placed:
        before = found[name].pieces if name in found else ()
        pieces = (*before, piece)
        shape = tuple(
            max(sizes) for sizes in zip(*([part.stop for part in piece.slices] for piece in pieces), strict=True)
        )
        found[name] = Tensor(array.dtype.name, shape, pieces)
    return found


def _written(file: int, data: memoryview) -> int:
    """Writes an array; its CRC-32."""
    crc32 = 0
    for chunk in filesystem.chunks(data):
        crc32 = zlib.crc32(chunk, crc32)
        filesystem.write(file, chunk)
    return crc32


def read_manifest(directory: Path) -> Manifest:
    """What a checkpoint says it holds, with the sizes of its files compared.

    Raises:
        CheckpointError: The manifest is missing, damaged or says what cannot be; another file is missing or of another
            size. Names the file, and the first arrays that are cut off.
    """
    return _read_manifest(directory, from_disk=False)


def read_contents(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """What is in a checkpoint beside arrays.

    Raises:
        CheckpointError: It is damaged.
    """
    return _read_contents(directory, manifest, from_disk=False)


def read_arrays(directory: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by name. Their bytes are copied into memory and looked at no further until all agree.

    Raises:
        CheckpointError: A byte is not as it was written. Names the file and the arrays.
    """
    arrays = {name: np.empty(tensor.shape, dtype_of(tensor.dtype)) for name, tensor in manifest.tensors.items()}
    for file in manifest.files:
        _read_arrays(directory, file, manifest, arrays)
    return arrays


def verify(directory: Path, *, from_disk: bool = False) -> Manifest:
    """Reads all of a checkpoint and keeps nothing but its manifest.

    Args:
        directory: Where it is.
        from_disk: Whether to read it past the memory of the system, if the system can.

    Raises:
        CheckpointError: Something is damaged, by name.
    """
    manifest = _read_manifest(directory, from_disk=from_disk)
    _read_contents(directory, manifest, from_disk=from_disk)
    for file in manifest.files:
        _read_arrays(directory, file, manifest, {}, from_disk=from_disk)
    return manifest


def _read_manifest(directory: Path, *, from_disk: bool) -> Manifest:
    data = _read(directory, MANIFEST, from_disk=from_disk)
    try:
        manifest = Manifest.from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError(f"HL513: {directory / MANIFEST}: {error}") from error
    for name in (*manifest.files, CONTENTS):
        with filesystem.reading(directory, name) as (_, size):
            _check_size(directory / name, size, manifest)
    return manifest


def _read_contents(directory: Path, manifest: Manifest, *, from_disk: bool) -> dict[str, Any]:
    data = _read(directory, CONTENTS, from_disk=from_disk)
    if hashlib.sha256(data).hexdigest() != manifest.contents.sha256:
        raise CheckpointError(f"HL514: {directory / CONTENTS} is damaged: its SHA-256 is not the one in {MANIFEST}.")
    return decode(data, str(directory / CONTENTS))


def _read(directory: Path, name: str, *, from_disk: bool) -> bytes:
    with filesystem.reading(directory, name) as (file, size):
        if size > _LARGEST:
            raise CheckpointError(f"HL515: {directory / name} has {size:,} bytes, of {_LARGEST:,} that it may have.")
        reader = filesystem.Reader(file, size, from_disk=from_disk)
        return b"".join(map(bytes, reader.take(size)))


def _check_size(path: Path, size: int, manifest: Manifest) -> None:
    expected = manifest.contents.bytes if path.name == CONTENTS else manifest.files[path.name]
    if size == expected:
        return
    message = f"{path} is damaged: it has {size:,} bytes, of {expected:,} that were written."
    if path.name != CONTENTS and size < expected:
        begin = len(header(manifest.tensors, path.name))
        cut = [name for name, piece in in_order(manifest.tensors, path.name) if begin + piece.stop > size]
        message += f" Of it, {_list([f'the array {name!r}' for name in cut])} cut off." if cut else ""
    raise CheckpointError("HL516", message)


def _read_arrays(
    directory: Path, file: str, manifest: Manifest, into: Mapping[str, np.ndarray], *, from_disk: bool = False
) -> None:
    """Reads a file of arrays from its first byte to its last, into arrays where some are given."""
    with filesystem.reading(directory, file) as (opened, size):
        _check_size(directory / file, size, manifest)
        reader, expected = filesystem.Reader(opened, size, from_disk=from_disk), header(manifest.tensors, file)
        damaged = [] if b"".join(map(bytes, reader.take(len(expected)))) == expected else ["its header"]
        for name, piece in in_order(manifest.tensors, file):
            if _read_piece(reader, piece, into.get(name)) != piece.crc32:
                damaged.append(f"the array {name!r}")
    if damaged:
        raise CheckpointError(f"HL517: {directory / file} is damaged: {_list(damaged)} not as written.")


def _read_piece(reader: filesystem.Reader, piece: Piece, array: np.ndarray | None) -> int:
    """Reads the next piece of a file, into its place if there is an array; its CRC-32."""
    crc32, at = 0, 0
    values = None if array is None else array if array.shape == piece.shape else np.empty(piece.shape, array.dtype)
    memory = None if values is None else as_bytes(values)
    for chunk in reader.take(piece.stop - piece.start):
        crc32 = zlib.crc32(chunk, crc32)
        if memory is not None:
            memory[at : at + len(chunk)] = chunk
            at += len(chunk)
    if array is not None and values is not array:
        array[piece.slices] = values
    return crc32


def _list(parts: list[str]) -> str:
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(parts[:3]) + more + (" is" if len(parts) == 1 else " are")
