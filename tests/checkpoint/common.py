"""Helpers for tests of checkpoints: a state, a store of it, and an operating system that fails on demand."""

import functools
import hashlib
import json
import os
import shutil
from types import MappingProxyType

import numpy as np

from handloom._util.shard import Shard
from handloom.checkpoint import filesystem, lock, snapshot
from handloom.checkpoint.encoding import decode, encode
from handloom.checkpoint.format import Draft
from handloom.checkpoint.store import Store

ARRAYS, CONTENTS, MANIFEST = FILES = ("arrays.safetensors", "contents.json", "manifest.json")
# The calls that change something on disk.
CHANGES = {"open", "write", "fsync", "ftruncate", "rename", "unlink", "rmdir", "mkdir", "makedirs"}


class Shim:
    """Replaces the module `os`: `before(name, arguments)` sees each call that changes something, and may fail."""

    def __init__(self, before):
        self._before = before

    def __getattr__(self, name):
        found = getattr(os, name)
        return functools.partial(self._call, found) if name in CHANGES else found

    def _call(self, function, *arguments, **keywords):
        self._before(function.__name__, arguments)
        return function(*arguments, **keywords)


def install(before):
    """Passes the system calls of checkpoints through `before`; `None` ends that."""
    filesystem.os = lock.os = os if before is None else Shim(before)


class Nth:
    """Does something at the n-th of the calls with these names (from 0)."""

    def __init__(self, number, act, names=CHANGES):
        self.number, self.act, self.names, self.count = number, act, names, 0

    def __call__(self, name, arguments):
        if name in self.names:
            self.count += 1
            if self.count == self.number + 1:
                self.act(name, arguments)


class Copies:
    """Copies a directory before each call that changes something, and as it would be in the middle of each write.

    A process that is killed leaves on the disk what its calls have done, so that these are all that it can leave.
    """

    def __init__(self, directory, folder):
        self._directory, self._folder, self._count = directory, folder, 0

    def __call__(self, name, arguments):
        if not self._directory.exists():
            return
        self._copy(f"before {name}")
        if name == "write":
            file, data = arguments
            with (self._copy("within write") / self._path(file)).open("ab") as half:
                half.write(data[: len(data) // 2])

    def _copy(self, when):
        self._count += 1
        return shutil.copytree(self._directory, self._folder / f"{self._count:03} {when}")

    def _path(self, file):
        inode = os.fstat(file).st_ino
        [path] = [path for path in self._directory.rglob("*") if path.stat().st_ino == inode]
        return path.relative_to(self._directory)

    def different(self):
        """The copies that differ from each other, in order."""
        first = {}
        for copy in sorted(self._folder.iterdir()):
            files = {str(path.relative_to(copy)): path.is_file() and path.read_bytes() for path in copy.rglob("*")}
            first.setdefault(tuple(sorted(files.items())), copy)
        return list(first.values())


def failing(code):
    """A call that fails with an error code."""

    def act(name, arguments):
        raise OSError(code, os.strerror(code))

    return act


def arrays(step):
    """A state with one array of each kind, different at each step."""
    random = np.random.default_rng(step)
    return {
        "model.dense.kernel": random.normal(size=(5, 7)).astype("float32"),
        "model.dense.bias": random.normal(size=7).astype("float64"),
        "optimizer.iterations": np.array(step, "int64"),
        "model.mask": random.normal(size=3) > 0,
        "model.empty": np.zeros((0, 4), "float16"),
    }


def contents(step):
    return {"progress": {"step": step, "epoch": step / 3}, "history": [1.5, None, "words"]}


def save(directory, step, *, keep=None, best=None, metrics=None):
    """Saves the state of that step, in a store of its own."""
    store = Store(directory, keep, best)
    try:
        store.save(draft(step, metrics))
    finally:
        store.close()


def draft(step, metrics=None):
    return draft_of(arrays(step), contents(step), metrics, step=step)


def draft_of(arrays=None, contents=None, metrics=None, step=7):
    """A checkpoint of these, with whole arrays in one file."""
    return Draft(step, [whole(arrays or {})], contents or {}, metrics or {})


def whole(arrays):
    """Each array as its one shard on one device."""
    return {name: [Shard.whole(array)] for name, array in arrays.items()}


def is_of(checkpoint, step):
    """Whether a checkpoint is that of the step, bitwise identical."""
    expected = arrays(step)
    return (
        checkpoint.step == step
        and checkpoint.contents == contents(step)
        and checkpoint.arrays.keys() == expected.keys()
        and all(same_bytes(checkpoint.arrays[name], array) for name, array in expected.items())
    )


def same_bytes(one, other):
    """Whether two arrays are equal in dtype, shape and every bit."""
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def take(state, into=MappingProxyType({})):
    """A copy of a state as whole arrays and JSON."""
    shards, contents = snapshot.take(state, whole(into))
    return {name: shard.value for name, [shard] in shards.items()}, json.loads(json.dumps(contents, allow_nan=False))


def through_a_checkpoint(value):
    """A value, encoded and decoded."""
    stored = {}
    encoded = encode(value, "@it", stored)
    draft_of(stored)  # Checks the names and dtypes.
    return decode(json.loads(json.dumps(encoded, allow_nan=False)), stored)


def flip(path, position=-1, bit=0):
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def header_size(path):
    """The size of the header of a safetensors file."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def forge(directory, change):
    """Changes the manifest of a checkpoint, and corrects its SHA-256."""
    path = directory / MANIFEST
    record = json.loads(path.read_bytes())
    del record["sha256"]
    changed = change(record)
    body = changed if isinstance(changed, bytes) else json.dumps(record, separators=(",", ":")).encode()
    path.write_bytes(b'{"sha256":"%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:])


def forge_file(directory, name, data):
    """Replaces a file of a checkpoint, and corrects its size and SHA-256 in the manifest."""
    (directory / name).write_bytes(data)

    def change(record):
        if name == CONTENTS:
            record["contents"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        else:
            record["files"][name] = len(data)

    forge(directory, change)
