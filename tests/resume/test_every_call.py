"""Killed at any call to the system that a save makes, a run goes on from what is there then, to the same bits.

A killed process leaves on the disk what its calls have done. So here a run notes what is there before each call, and in
the middle of each write, and from each of these it is gone on with, as a new process would: the variables as they are
made, the seeds set anew. At night (`make nightly`) processes are killed at each call indeed.
"""

import itertools
import json
import os
import shutil
import signal

import keras
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from tests.checkpoint.common import install
from tests.resume.processes import Child, killed_at, to_the_end
from tests.resume.runs import BATCH, RUNS, X, Y, left

AT_NIGHT = "HANDLOOM_KILLS" in os.environ


class Again:
    """A model that is trained again and again from its start, and compiled once."""

    def __init__(self):
        self.model = hl.Sequential([keras.Input((3,)), layers.Dropout(0.5), layers.Dense(1)])
        self.model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss="mse")
        self.model.fit(X, Y, batch_size=BATCH, verbose=0)
        self.start = {
            name: ops.convert_to_numpy(variable.value).copy()
            for name, variable in named({"model": self.model})[0].items()
        }

    def train(self, run_dir):
        """Two epochs of six steps, saved after every fifth and at the end, where the one before goes each time."""
        for name, variable in named({"model": self.model})[0].items():
            variable.assign(self.start[name])
        options = {"save": hl.every(steps=5), "keep": 1, "seed": 1, "verbose": 0}
        history = self.model.fit(X, Y, batch_size=BATCH, epochs=2, run_dir=run_dir, **options)
        return left(run_dir, {"model": self.model}, history, [])


class Notes:
    """Copies a directory before each call that changes something, and as it would be in the middle of a write."""

    def __init__(self, directory, copies):
        self.directory, self.copies, self.seen = directory, copies, {}

    def __call__(self, name, arguments):
        if not self.directory.exists():
            return
        self._note(f"before {name}")
        if name == "write":
            file, data = arguments
            copy = self._note("within write")
            with (copy / self._path(file)).open("ab") as half:
                half.write(data[: len(data) // 2])

    def _note(self, when):
        copy = self.copies / f"{len(self.seen)} {when}"
        shutil.copytree(self.directory, copy)
        self.seen[copy] = when
        return copy

    def _path(self, file):
        inode = os.fstat(file).st_ino
        [path] = [path for path in self.directory.rglob("*") if path.stat().st_ino == inode]
        return path.relative_to(self.directory)

    def different(self):
        """The copies, of which no two are alike."""
        alike = {}
        for copy in self.seen:
            found = {path.relative_to(copy): path.is_file() and path.read_bytes() for path in copy.rglob("*")}
            alike.setdefault(tuple(sorted((str(name), data) for name, data in found.items())), copy)
        return list(alike.values())


def test_a_run_goes_on_from_what_any_call_of_its_saves_leaves(tmp_path):
    run = Again()
    whole = run.train(tmp_path / "whole")
    notes = Notes(tmp_path / "noted", tmp_path / "copies")
    install(notes)
    try:
        assert run.train(tmp_path / "noted") == whole
    finally:
        install(None)
    copies = notes.different()
    saved = {tuple(hl.Checkpointer(copy / "checkpoints", {}).steps) for copy in copies}
    assert saved >= {(), (5,), (5, 10), (10,), (10, 12), (12,)}
    for copy in copies:
        found = run.train(copy)
        for part, expected in whole.items():
            assert found[part] == expected, f"{copy.name}: {part}"
    print(f"went on from {len(copies)} different states of the disk, noted at {len(notes.seen)} instants")


@pytest.mark.skipif(not AT_NIGHT, reason="at night: a hundred processes")
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_each_call_of_a_save_a_run_is_gone_on_with_to_the_same_bits(kind, tmp_path):
    """The save is one that replaces another; each process begins right after that one."""
    result, output, calls = tmp_path / "result.json", tmp_path / "output", []

    def to_its_end(run_dir):
        child = Child(to_the_end, kind, run_dir, 1, result, output=output)
        assert child.end() == 0, child.output
        return json.loads(result.read_text(encoding="utf-8"))

    whole = to_its_end(tmp_path / "whole")
    first = Child(to_the_end, kind, tmp_path / "first", 1, result, output=output)
    assert "saved" in first.words()
    first.kill()
    assert first.end() == -signal.SIGKILL
    for number in itertools.count():
        shutil.copytree(tmp_path / "first", tmp_path / str(number))
        child = Child(killed_at, number, kind, tmp_path / str(number), 1, output=output)
        assert child.end() == -signal.SIGKILL, child.output
        *before, (call, _) = child.told
        if "saved" in [word for word, _ in before]:
            break
        calls.append(call)
        found = to_its_end(tmp_path / str(number))
        for part, expected in whole.items():
            assert found[part] == expected, f"{call}, number {number}: {part}"
    assert {"open", "ftruncate", "mkdir", "write", "fsync", "rename", "unlink", "rmdir"} == set(calls)
    print(f"killed at {len(calls)} calls: {' '.join(calls)}")
