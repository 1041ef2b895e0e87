"""A checkpoint as bytes: the files in its directory, written from arrays and JSON values, and read with all checks.

    arrays.safetensors   the arrays, readable by any safetensors reader; or several such files, each with pieces of
                         arrays: arrays-00001-of-00002.safetensors
    contents.json        everything else
    manifest.json        the step, the metrics, the sizes of the files, each array with a CRC-32 for each of its pieces

This module reads and writes the safetensors format itself. The safetensors library can read neither into given memory
nor from an open file, and writes without a second copy of the arrays only if it is given addresses in memory.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handloom._util.first_few import first_few
from handloom._util.shard import Shard
from handloom.checkpoint import filesystem
from handloom.checkpoint.dtypes import as_bytes, as_stored, dtype_of
from handloom.checkpoint.manifest import (
    CONTENTS,
    MANIFEST,
    Contents,
    Manifest,
    Piece,
    Tensor,
    arrays_file,
    check_name,
    file_size,
    header,
    layout,
)
from handloom.checkpoint.retention import Slot
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

# Bytes: about 200,000 arrays, or a history of as many epochs. Without a limit, a file could fill the memory.
_LARGEST = 64 << 20

_Place = tuple[str, tuple[int, ...]]  # The name of an array, and the offset of a piece of it.


class Draft:
    """A checkpoint that is not on disk yet.

    Args:
        step: The step that it is of.
        parts: For each file of arrays, name to the shards of that array. Together they are whole arrays. They must not
            change until they are written.
        contents: JSON values.
        metrics: Name to value.

    Attributes:
        bytes: The space that it needs, to within a few kilobytes.

    Raises:
        CheckpointError: Something in it cannot be saved; the message names it.
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
        self._files = [arrays_file(index, len(parts)) for index in range(len(parts))]
        self._arrays = {
            (name, shard.offset): (file, as_stored(name, shard.value))
            for file, part in zip(self._files, parts, strict=True)
            for name, shards in part.items()
            for shard in shards
        }
        self._contents = encode(contents, "contents")
        if len(self._contents) > _LARGEST:
            raise CheckpointError(
                f"HL511: The contents take {len(self._contents):,} bytes as JSON; at most {_LARGEST:,} are allowed.",
                fix="Keep large values in arrays.",
            )
        manifest = self._manifest({})
        self.bytes = manifest.nbytes + len(manifest.to_bytes()) + 4096

    def write(self, directory: Path) -> None:
        """Writes the files into an empty directory, flushes them to disk, and reads them back from there.

        Raises:
            CheckpointError: A file does not read back as written; the message names it.
        """
        tensors, checksums = self._manifest({}).tensors, {}
        for file in self._files:
            with filesystem.creating(directory / file) as out:
                filesystem.write(out, header(tensors, file))
                for name, piece, *_ in layout(tensors, file):
                    _, array = self._arrays[name, piece.offset]
                    checksums[name, piece.offset] = _write(out, as_bytes(array))
        for file, data in ((CONTENTS, self._contents), (MANIFEST, self._manifest(checksums).to_bytes())):
            with filesystem.creating(directory / file) as out:
                filesystem.write(out, data)
        verify(directory, from_disk=True)

    def _manifest(self, checksums: Mapping[_Place, int]) -> Manifest:
        tensors: dict[str, Tensor] = {}
        for (name, offset), (file, array) in self._arrays.items():
            piece = Piece(file, offset, array.shape, checksums.get((name, offset), 0))
            stops = tuple(part.stop for part in piece.slices)
            before = tensors.get(name, Tensor(array.dtype.name, stops, ()))
            shape = tuple(map(max, before.shape, stops))
            tensors[name] = Tensor(before.dtype, shape, (*before.pieces, piece))
        files = {file: file_size(tensors, file) for file in self._files}
        contents = Contents(len(self._contents), hashlib.sha256(self._contents).hexdigest())
        return Manifest(self.step, self.metrics, tensors, files, contents)


def _write(file: int, data: memoryview) -> int:
    """Writes an array and returns its CRC-32."""
    crc32 = 0
    for begin in range(0, len(data), filesystem.CHUNK):
        chunk = data[begin : begin + filesystem.CHUNK]
        crc32 = zlib.crc32(chunk, crc32)
        filesystem.write(file, chunk)
    return crc32


def read_manifest(directory: Path, *, from_disk: bool = False) -> Manifest:
    """Reads the manifest of a checkpoint, and compares the sizes of its files.

    Args:
        directory: The directory of the checkpoint.
        from_disk: Whether to bypass the page cache of the system, if possible.

    Raises:
        CheckpointError: The manifest is missing, damaged or contradicts itself; or it is of another step than the name
            of its directory; or another file is missing or has another size. The message names the file, and the first
            arrays that are cut off.
    """
    data = _read(directory, MANIFEST, from_disk=from_disk)
    try:
        manifest = Manifest.from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError(f"HL513: {directory / MANIFEST} cannot be used. {error}") from error
    slot = Slot.of(directory.name)
    if slot is not None and slot.step != manifest.step:
        raise CheckpointError(f"HL541: {directory} holds the checkpoint of step {manifest.step}, not of {slot.step}.")
    for name in (*manifest.files, CONTENTS):
        with filesystem.reading(directory, name) as (_, size):
            _check_size(directory / name, size, manifest)
    return manifest


def read_contents(directory: Path, manifest: Manifest, *, from_disk: bool = False) -> dict[str, Any]:
    """Reads the JSON values of a checkpoint.

    Raises:
        CheckpointError: The file is damaged.
    """
    data = _read(directory, CONTENTS, from_disk=from_disk)
    if hashlib.sha256(data).hexdigest() != manifest.contents.sha256:
        raise CheckpointError(f"HL514: {directory / CONTENTS} is damaged: it does not match its SHA-256 in {MANIFEST}.")
    return decode(data, str(directory / CONTENTS))


def read_arrays(directory: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Reads the arrays of a checkpoint, by name. Nothing looks at their bytes until all checksums match.

    Raises:
        CheckpointError: A byte is not as written. The message names the file and the arrays.
    """
    arrays = {name: np.empty(tensor.shape, dtype_of(tensor.dtype)) for name, tensor in manifest.tensors.items()}
    for file in manifest.files:
        _read_arrays(directory, file, manifest, arrays)
    return arrays


def verify(directory: Path, *, from_disk: bool = False) -> Manifest:
    """Reads every byte of a checkpoint, and keeps only the manifest.

    Args:
        directory: The directory of the checkpoint.
        from_disk: Whether to bypass the page cache of the system, if possible.

    Raises:
        CheckpointError: Something is damaged; the message names it.
    """
    manifest = read_manifest(directory, from_disk=from_disk)
    read_contents(directory, manifest, from_disk=from_disk)
    for file in manifest.files:
        _read_arrays(directory, file, manifest, {}, from_disk=from_disk)
    return manifest


def _read(directory: Path, name: str, *, from_disk: bool) -> bytes:
    with filesystem.reading(directory, name) as (file, size):
        if size > _LARGEST:
            raise CheckpointError(f"HL515: {directory / name} has {size:,} bytes; at most {_LARGEST:,} are allowed.")
        return filesystem.Reader(file, size, from_disk=from_disk).read(size)


def _check_size(path: Path, size: int, manifest: Manifest) -> None:
    expected = manifest.contents.bytes if path.name == CONTENTS else manifest.files[path.name]
    if size != expected:
        raise CheckpointError(
            f"HL516: {path} is damaged: it has {size:,} bytes; {expected:,} were written.",
            _cut_off(path.name, size, manifest),
        )


def _cut_off(file: str, size: int, manifest: Manifest) -> str:
    """A sentence that names the arrays after the end of a file, if there are any."""
    begin = len(header(manifest.tensors, file))
    cut = [repr(name) for name, *_, stop in layout(manifest.tensors, file) if begin + stop > size]
    return f"Bytes of {first_few(cut, 3)} are missing." if cut else ""


def _read_arrays(
    directory: Path, file: str, manifest: Manifest, into: Mapping[str, np.ndarray], *, from_disk: bool = False
) -> None:
    """Reads a file of arrays from its first byte to its last, into the given arrays."""
    with filesystem.reading(directory, file) as (opened, size):
        _check_size(directory / file, size, manifest)
        reader, expected = filesystem.Reader(opened, size, from_disk=from_disk), header(manifest.tensors, file)
        damaged = [] if reader.read(len(expected)) == expected else ["its header"]
        for name, piece, start, stop in layout(manifest.tensors, file):
            if _read_piece(reader, stop - start, piece, into.get(name)) != piece.crc32:
                damaged.append(f"the array {name!r}")
    if damaged:
        raise CheckpointError(f"HL517: {directory / file} is damaged: {first_few(damaged, 3)} changed since the save.")


def _read_piece(reader: filesystem.Reader, nbytes: int, piece: Piece, array: np.ndarray | None) -> int:
    """Reads the next piece of a file, into its place in the array if there is one, and returns its CRC-32."""
    crc32, at, values, memory = 0, 0, array, None
    if array is not None:
        values = array if array.shape == piece.shape else np.empty(piece.shape, array.dtype)
        memory = as_bytes(values)
    for chunk in reader.take(nbytes):
        crc32 = zlib.crc32(chunk, crc32)
        if memory is not None:
            memory[at : at + len(chunk)] = chunk
            at += len(chunk)
    if array is not None and values is not array:
        array[piece.slices] = values
    return crc32
