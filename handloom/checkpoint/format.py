"""A checkpoint as bytes: three files in a directory, written from arrays and JSON values, read with all checks.

    arrays.safetensors   the arrays, as any reader of safetensors takes them
    contents.json        everything else
    manifest.json        the step, the metrics, size and SHA-256 of the other files, each tensor with its CRC-32

The safetensors file is written and read here and not by its library: which one can be told neither to read into given
memory nor from an open file, and to write without a second copy of the arrays only by addresses in memory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handloom.checkpoint import filesystem
from handloom.checkpoint.dtypes import as_bytes, dtype_of, plain
from handloom.checkpoint.manifest import ARRAYS, CONTENTS, MANIFEST, File, Manifest, Tensor, check_name, header
from handloom.checkpoint.strict_json import decode, encode
from handloom.errors import CheckpointError

# Bytes; some 100,000 tensors, and a history of as many epochs. Without an end, a file could fill the memory.
_LARGEST = {MANIFEST: 16 << 20, CONTENTS: 64 << 20}
_SCRATCH = 1 << 20


class Draft:
    """A checkpoint that is not on the disk yet.

    Args:
        step: Which step it is of.
        arrays: Name to array. They must not change until it has been written.
        contents: JSON values.
        metrics: Name to value.

    Attributes:
        bytes: How much room it needs, within a few kilobytes.

    Raises:
        CheckpointError: Something in it that cannot be saved, by name.
    """

    def __init__(
        self, step: int, arrays: Mapping[str, np.ndarray], contents: dict[str, Any], metrics: Mapping[str, float]
    ) -> None:
        for name in (*arrays, *metrics):
            check_name(name)
        self.step = step
        self.metrics = dict(metrics)
        self._arrays = _in_order(arrays)
        self._tensors = _laid_out(self._arrays)
        self._header = header(self._tensors)
        self._contents = encode(contents, "contents")
        if len(self._contents) > _LARGEST[CONTENTS]:
            raise CheckpointError(
                "HL511",
                f"The contents take {len(self._contents):,} bytes as JSON, of {_LARGEST[CONTENTS]:,} that they may. "
                "What is large belongs in arrays.",
            )
        size = len(self._header) + sum(array.nbytes for array in self._arrays.values()) + len(self._contents)
        self.bytes = size + len(self._manifest({}).to_bytes()) + 4096

    def write(self, directory: Path) -> None:
        """Writes the three files into an empty directory, to the disk, and reads them back.

        Raises:
            CheckpointError: What is read is not what was written, by name.
        """
        files = {ARRAYS: self._write_arrays(directory / ARRAYS), CONTENTS: _write(directory / CONTENTS, self._contents)}
        manifest = self._manifest(files).to_bytes()
        _write(directory / MANIFEST, manifest)
        arrays = {f"the tensor {name!r}": as_bytes(array) for name, array in self._arrays.items()}
        _compare_with_memory(directory, ARRAYS, {"its header": memoryview(self._header)} | arrays)
        _compare_with_memory(directory, CONTENTS, {"something in it": memoryview(self._contents)})
        _compare_with_memory(directory, MANIFEST, {"something in it": memoryview(manifest)})

    def _write_arrays(self, path: Path) -> File:
        parts = {name: as_bytes(array) for name, array in self._arrays.items()}
        # The SHA-256 takes as long as all the rest. A step on all cores waits for the slowest of them: two threads side
        # by side hold it up half as long as one after the other.
        with concurrent.futures.ThreadPoolExecutor(1) as beside, filesystem.creating(path) as file:
            sha256 = beside.submit(_sha256, [memoryview(self._header), *parts.values()])
            filesystem.write(file, memoryview(self._header))
            for name, part in parts.items():
                crc32 = 0
                for chunk in filesystem.chunks(part):
                    crc32 = zlib.crc32(chunk, crc32)
                    filesystem.write(file, chunk)
                self._tensors[name] = dataclasses.replace(self._tensors[name], crc32=crc32)
        return File(len(self._header) + sum(map(len, parts.values())), sha256.result())

    def _manifest(self, files: dict[str, File]) -> Manifest:
        return Manifest(self.step, self.metrics, self._tensors, files)


def _write(path: Path, data: bytes) -> File:
    with filesystem.creating(path) as file:
        filesystem.write(file, memoryview(data))
    return File(len(data), hashlib.sha256(data).hexdigest())


def _sha256(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _compare_with_memory(directory: Path, name: str, parts: Mapping[str, memoryview]) -> None:
    with filesystem.reading(directory, name) as (file, size):
        damaged = filesystem.differing(file, size, parts)
    if damaged:
        raise CheckpointError("HL512", f"{directory / name} is damaged: {_list(damaged)} not as written.")


def _in_order(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Large elements first, so that all are aligned in memory; then by name."""
    ready = {name: plain(name, array) for name, array in arrays.items()}
    return dict(sorted(ready.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _laid_out(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    found, end = {}, 0
    for name, array in arrays.items():
        found[name] = Tensor(array.dtype.name, array.shape, end, end + array.nbytes)
        end += array.nbytes
    return found


def read_manifest(directory: Path) -> Manifest:
    """What a checkpoint says it holds, with the sizes of its files compared.

    Raises:
        CheckpointError: The manifest is missing, damaged or says what cannot be; another file is missing or of another
            size. Names the file, and the first tensor that is cut off.
    """
    data = _read(directory, MANIFEST)
    try:
        manifest = Manifest.from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError("HL513", f"{directory / MANIFEST}: {error}") from error
    for name in manifest.files:
        with filesystem.reading(directory, name) as (_, size):
            _check_size(directory / name, size, manifest)
    return manifest


def read_contents(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """What is in a checkpoint beside arrays.

    Raises:
        CheckpointError: It is damaged.
    """
    data = _read(directory, CONTENTS)
    if hashlib.sha256(data).hexdigest() != manifest.files[CONTENTS].sha256:
        raise CheckpointError("HL514", f"{directory / CONTENTS} is damaged: its SHA-256 is not the one in {MANIFEST}.")
    return decode(data, str(directory / CONTENTS))


def read_arrays(directory: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by name. Their bytes are copied into memory and looked at no further until all agree.

    Raises:
        CheckpointError: A byte is not as it was written. Names the file and the tensors.
    """
    with filesystem.reading(directory, ARRAYS) as (file, size):
        _check_size(directory / ARRAYS, size, manifest)  # Before memory is asked for.
        arrays = {name: np.empty(tensor.shape, dtype_of(tensor.dtype)) for name, tensor in manifest.tensors.items()}
        _compare(directory, manifest, file, {name: as_bytes(array) for name, array in arrays.items()})
    return arrays


def verify(directory: Path) -> Manifest:
    """Reads all of a checkpoint and keeps nothing but its manifest.

    Raises:
        CheckpointError: Something is damaged, by name.
    """
    manifest = read_manifest(directory)
    read_contents(directory, manifest)
    with filesystem.reading(directory, ARRAYS) as (file, size):
        _check_size(directory / ARRAYS, size, manifest)
        _compare(directory, manifest, file, {})
    return manifest


def _read(directory: Path, name: str) -> bytes:
    with filesystem.reading(directory, name) as (file, size):
        if size > _LARGEST[name]:
            raise CheckpointError(
                "HL515", f"{directory / name} has {size:,} bytes, of {_LARGEST[name]:,} that it may have."
            )
        data = bytearray(size)
        return bytes(data[: filesystem.fill(file, memoryview(data))])


def _check_size(path: Path, size: int, manifest: Manifest) -> None:
    expected = manifest.files[path.name].bytes
    if size == expected:
        return
    message = f"{path} is damaged: it has {size:,} bytes, of {expected:,} that were written."
    if path.name == ARRAYS and size < expected:
        begin = len(header(manifest.tensors))
        cut = [f"the tensor {name!r}" for name, tensor in manifest.tensors.items() if begin + tensor.stop > size]
        message += f" Of it, {_list(cut)} cut off." if cut else ""
    raise CheckpointError("HL516", message)


def _compare(directory: Path, manifest: Manifest, file: int, into: Mapping[str, memoryview]) -> None:
    """Reads the file of arrays from its first byte to its last, into memory where some is given."""
    expected, scratch = header(manifest.tensors), memoryview(bytearray(_SCRATCH))
    found = memoryview(bytearray(len(expected)))
    filesystem.fill(file, found)
    digest, damaged = hashlib.sha256(found), [] if found == expected else ["its header"]
    for name, tensor in manifest.tensors.items():
        crc32 = 0
        for begin in range(0, tensor.stop - tensor.start, _SCRATCH):
            length = min(_SCRATCH, tensor.stop - tensor.start - begin)
            chunk = into[name][begin : begin + length] if name in into else scratch[:length]
            filesystem.fill(file, chunk)
            digest.update(chunk)
            crc32 = zlib.crc32(chunk, crc32)
        if crc32 != tensor.crc32:
            damaged.append(f"the tensor {name!r}")
    if damaged:
        raise CheckpointError("HL517", f"{directory / ARRAYS} is damaged: {_list(damaged)} not as written.")
    if digest.hexdigest() != manifest.files[ARRAYS].sha256:
        raise CheckpointError("HL518", f"{directory / ARRAYS} is damaged: its SHA-256 is not the one in {MANIFEST}.")


def _list(parts: list[str]) -> str:
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(parts[:3]) + more + (" is" if len(parts) == 1 else " are")
