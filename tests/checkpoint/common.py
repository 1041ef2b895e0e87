"""What the tests of checkpoints share: a state, a store of it, and an operating system that fails when told to."""

import functools
import hashlib
import json
import os
from types import MappingProxyType

import numpy as np

from handloom._util.shard import Shard
from handloom.checkpoint import filesystem, lock, snapshot
from handloom.checkpoint.encoding import decode, encode
from handloom.checkpoint.format import Draft
from handloom.checkpoint.store import Store

# What changes something on the disk.
CHANGES = {"open", "write", "fsync", "ftruncate", "rename", "unlink", "rmdir", "mkdir", "makedirs"}


class Shim:
    """Stands in for the module `os`: `before(name, arguments)` sees each call that changes something, and may fail."""

    def __init__(self, before):
        self._before = before

    def __getattr__(self, name):
        found = getattr(os, name)
        return functools.partial(self._call, found) if name in CHANGES else found

    def _call(self, function, *arguments, **keywords):
        self._before(function.__name__, arguments)
        return function(*arguments, **keywords)


def install(before):
    """Has the checkpoint's calls of the operating system go through `before`; `None` ends that."""
    filesystem.os = lock.os = os if before is None else Shim(before)


class Nth:
    """Does something at the n-th of the calls named (from 0), and counts."""

    def __init__(self, number, act, names=CHANGES):
        self.number, self.act, self.names, self.count = number, act, names, 0

    def __call__(self, name, arguments):
        if name in self.names:
            self.count += 1
            if self.count == self.number + 1:
                self.act(name, arguments)


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
    """A checkpoint of these, whose arrays are whole and in one file."""
    return Draft(step, [whole(arrays or {})], contents or {}, metrics or {})


def whole(arrays):
    """Each array as the one shard that it has where there is one device."""
    return {name: [Shard.whole(array)] for name, array in arrays.items()}


def is_of(checkpoint, step):
    """Whether a checkpoint is that of the step, to the last bit."""
    expected = arrays(step)
    return (
        checkpoint.step == step
        and checkpoint.contents == contents(step)
        and checkpoint.arrays.keys() == expected.keys()
        and all(same(checkpoint.arrays[name], array) for name, array in expected.items())
    )


def same(one, other):
    """Whether two arrays are equal in type, shape and every bit."""
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def take(state, into=MappingProxyType({})):
    """What is taken of a state, as whole arrays and JSON."""
    shards, contents = snapshot.take(state, whole(into))
    return {name: shard.value for name, [shard] in shards.items()}, json.loads(json.dumps(contents, allow_nan=False))


def through_a_checkpoint(value):
    """A value as it comes back from JSON and arrays."""
    stored = {}
    encoded = encode(value, "@it", stored)
    draft_of(stored)  # Names and types are such as a checkpoint takes.
    return decode(json.loads(json.dumps(encoded, allow_nan=False)), stored)


def forge(directory, change):
    """Changes the manifest of a checkpoint as one would who knows the format: its own SHA-256 is right again."""
    path = directory / "manifest.json"
    record = json.loads(path.read_bytes())
    del record["sha256"]
    changed = change(record)
    body = changed if isinstance(changed, bytes) else json.dumps(record, separators=(",", ":")).encode()
    path.write_bytes(b'{"sha256":"%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:])


def forge_file(directory, name, data):
    """Gives a file of a checkpoint other bytes, and the manifest their size and, for the contents, SHA-256."""
    (directory / name).write_bytes(data)
    contents = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def change(record):
        if name == "contents.json":
            record["contents"] = contents
        else:
            record["files"][name] = len(data)

    forge(directory, change)
