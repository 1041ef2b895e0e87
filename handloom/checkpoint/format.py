"""A checkpoint as bytes: the files in its directory, written from arrays and JSON values, and read with all checks.

    arrays.safetensors   the arrays, readable by any safetensors reader; or several such files, each with pieces of
                         arrays: arrays-00001-of-00002.safetensors
    contents.json        everything else
    manifest.json        the step, the metrics, the sizes of the files, each array with a CRC-32 for each of its pieces

This module reads and writes the safetensors format itself. The safetensors library can read neither into given memory
nor from an open file, and writes without a second copy of the arrays only if it is given addresses in memory.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handloom._util.first_few import first_few
from handloom._util.shard import Shards
from handloom.checkpoint import filesystem
from handloom.checkpoint.dtypes import as_bytes, as_stored, dtype_of
from handloom.checkpoint.manifest import CONTENTS, MANIFEST, Contents, Manifest, Piece, Tensor, arrays_file, check_name
from handloom.checkpoint.retention import Slot
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

# Bytes: about 200,000 arrays, or a history of as many epochs. Without a limit, a file could fill the memory.
_LARGEST = 64 << 20


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
        self, step: int, parts: Sequence[Shards], contents: dict[str, Any], metrics: Mapping[str, float]
    ) -> None:
        for name in (*(name for part in parts for name in part), *metrics):
            check_name(name)
        self.step = step
        self.metrics = dict(metrics)
        self._arrays: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # By the name, and the offset of the piece.
        self._contents = encode(contents, "contents")
        if len(self._contents) > _LARGEST:
            raise CheckpointError(
                f"HL511: The contents take {len(self._contents):,} bytes as JSON; at most {_LARGEST:,} are allowed.",
                fix="Keep large values in arrays.",
            )
        self._manifest = self._manifest_of({arrays_file(k, len(parts)): part for k, part in enumerate(parts)})
        self.bytes = self._manifest.nbytes + len(self._manifest.to_bytes()) + 4096

    def write(self, directory: Path) -> None:
        """Writes the files into an empty directory, flushes them to disk, and reads them back from there.

        Raises:
            CheckpointError: A file does not read back as written; the message names it.
        """
        for file in self._manifest.files:
            with filesystem.creating(directory / file) as out:
                filesystem.write(out, self._manifest.header(file))
                for name, piece, *_ in self._manifest.layout(file):
                    piece.crc32 = _write(out, as_bytes(self._arrays[name, piece.offset]))
        for file, data in ((CONTENTS, self._contents), (MANIFEST, self._manifest.to_bytes())):
            with filesystem.creating(directory / file) as out:
                filesystem.write(out, data)
        verify(directory, from_disk=True)

    def _manifest_of(self, parts: Mapping[str, Shards]) -> Manifest:
        """The manifest of these parts, each under the name of its file; without checksums. Keeps their arrays."""
        contents = Contents(len(self._contents), hashlib.sha256(self._contents).hexdigest())
        manifest = Manifest(self.step, self.metrics, {}, {}, contents)
        for file, part in parts.items():
            for name, shard in ((name, shard) for name, shards in part.items() for shard in shards):
                array = self._arrays[name, shard.offset] = as_stored(name, shard.value)
                piece = Piece(file, shard.offset, array.shape)
                stops = tuple(part.stop for part in piece.slices)
                known = manifest.tensors.get(name, Tensor(array.dtype.name, stops, ()))
                shape = tuple(map(max, known.shape, stops))
                manifest.tensors[name] = Tensor(known.dtype, shape, (*known.pieces, piece))
        # Only now: the name of a piece in its file tells whether it is the whole array.
        manifest.files.update({file: manifest.size_of(file) for file in parts})
        return manifest


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
    for name, expected in (manifest.files | {CONTENTS: manifest.contents.bytes}).items():
        with filesystem.reading(directory, name) as reader:
            if reader.size != expected:
                raise CheckpointError(
                    f"HL516: {directory / name} is damaged: it has {reader.size:,} bytes; {expected:,} were written.",
                    _cut_off(name, reader.size, manifest),
                )
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
    _read_arrays(directory, manifest, arrays, from_disk=False)
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
    _read_arrays(directory, manifest, {}, from_disk=from_disk)
    return manifest


def _read(directory: Path, name: str, *, from_disk: bool) -> bytes:
    with filesystem.reading(directory, name, from_disk=from_disk) as reader:
        if reader.size > _LARGEST:
            raise CheckpointError(f"HL515: {directory / name} has {reader.size:,} bytes; the limit is {_LARGEST:,}.")
        return reader.read(reader.size)


def _cut_off(file: str, size: int, manifest: Manifest) -> str:
    """A sentence that names the arrays after the end of a file, if there are any."""
    begin = len(manifest.header(file))
    cut = [repr(name) for name, *_, stop in manifest.layout(file) if begin + stop > size]
    return f"Bytes of {first_few(cut, 3)} are missing." if cut else ""


def _read_arrays(directory: Path, manifest: Manifest, into: Mapping[str, np.ndarray], *, from_disk: bool) -> None:
    """Reads each file of arrays from its first byte to its last, into the given arrays."""
    for file in manifest.files:
        with filesystem.reading(directory, file, from_disk=from_disk) as reader:
            expected = manifest.header(file)
            damaged = [] if reader.read(len(expected)) == expected else ["its header"]
            for name, piece, start, stop in manifest.layout(file):
                if _read_piece(reader, stop - start, piece, into.get(name)) != piece.crc32:
                    damaged.append(f"the array {name!r}")
        if damaged:
            raise CheckpointError(f"HL517: {directory / file} is damaged: {first_few(damaged, 3)} changed.")


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
