"""Checkpoints in a directory: at every instant a whole one is there, and the newest that is whole is the one read.

step_000000100/    a checkpoint; one of the same step saved again later is step_000000100_1
.writing/          one that is not finished; .removing/ one that is on its way out
.lock              held by the process that writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handloom.checkpoint import filesystem
from handloom.checkpoint.format import Draft, read_arrays, read_contents, read_manifest
from handloom.checkpoint.lock import WriterLock
from handloom.checkpoint.manifest import Manifest
from handloom.checkpoint.retention import Best, Slot, kept
from handloom.errors import CheckpointError

_WRITING, _REMOVING = ".writing", ".removing"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        path: The directory it was read from.
        step: Which step it was saved at.
        arrays: Name to NumPy array.
        contents: What is saved beside arrays, as JSON values.
        metrics: Name to value, as given to `save`.
    """

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    contents: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint that has been written.

    Attributes:
        step: Its step.
        bytes: Its size.
        seconds: How long that took, in the background.
        seconds_waited: For how long the steps waited before that.
    """

    step: int
    bytes: int
    seconds: float
    seconds_waited: float = 0.0


class Store:
    """Writes checkpoints into a directory and removes old ones. It knows no models, and imports no backend.

    Args:
        directory: Where. It is made when the first checkpoint is written.
        keep: How many of the last ones to keep; `None` for all.
        best: Which one to keep besides.

    Attributes:
        damaged: The places that were found damaged; they go when the next checkpoint has been written.
    """

    def __init__(self, directory: Path, keep: int | None = 3, best: Best | None = None) -> None:
        self.directory = directory
        self.damaged: dict[Slot, CheckpointError] = {}
        self._keep, self._best = keep, best
        self._metrics: dict[Slot, dict[str, float]] = {}
        self._lock: WriterLock | None = None

    def open(self) -> None:
        """Makes sure that this process can write, and no other does.

        Raises:
            CheckpointError: The directory cannot be written, or another process writes.
        """
        if self._lock is not None:
            return
        try:
            filesystem.prepare(self.directory)
            self._lock = WriterLock(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"HL537: No checkpoints can be written to {self.directory}: {error.strerror}. Choose another directory, or "
                "make this one writable.",
            ) from error

    def close(self) -> None:
        """Lets another process write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_step(self, step: int) -> None:
        """Refuses a step before one that is there: it would be the older one, and soon be gone.

        Raises:
            CheckpointError: There is a later one, which has not been found damaged.
        """
        later = [slot for slot in slots(self.directory) if slot.step > step and slot not in self.damaged]
        if later:
            raise CheckpointError(
                f"HL538: {self.directory} holds {later[-1].name}, of a later step than {step}. Go on from it with restore(), "
                "choose another directory, or remove it.",
            )

    def save(self, draft: Draft) -> Written:
        """Writes a checkpoint; then, and only then, removes those not to be kept.

        Returns:
            What it took.

        Raises:
            CheckpointError: It could not be written. Those that were there still are.
        """
        begun = time.perf_counter()
        self.open()
        self.check_step(draft.step)
        slot = self._free(draft.step)
        try:
            self._discard()
            self._check_space(draft.bytes)
            self._commit(draft, slot)
            self._prune(slot)
        except OSError as error:
            raise CheckpointError("HL539", self._failure(error, slot, draft.bytes)) from error
        return Written(draft.step, draft.bytes, time.perf_counter() - begun)

    def _free(self, step: int) -> Slot:
        same = [slot.again for slot in slots(self.directory) if slot.step == step]
        return Slot(step, max(same) + 1 if same else 0)

    def _check_space(self, needed: int) -> None:
        free = filesystem.free_bytes(self.directory)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed - free:,} bytes are missing")

    def _commit(self, draft: Draft, slot: Slot) -> None:
        aside = self.directory / _WRITING
        try:
            filesystem.make(aside)
            self._write(draft, aside, slot)
            filesystem.sync(aside)
            filesystem.rename(aside, self.directory / slot.name)
        except BaseException:
            with contextlib.suppress(OSError):
                filesystem.remove(aside)
            raise
        filesystem.sync(self.directory)
        self._metrics[slot] = draft.metrics

    def _write(self, draft: Draft, aside: Path, slot: Slot) -> None:
        try:
            draft.write(aside)
        except CheckpointError as error:
            raise CheckpointError(
                f"HL540: {slot.name} was not written to {self.directory}, as reading it back failed: {error} "
                "The checkpoints that were there still are.",
            ) from error

    def _prune(self, new: Slot) -> None:
        there = slots(self.directory)
        sound = [slot for slot in there if slot not in self.damaged or slot == new]
        for slot in set(there) - kept(sound, self._keep, self._best_of(sound)):
            # Under another name first: a checkpoint that is half removed would look like a damaged one.
            filesystem.rename(self.directory / slot.name, self.directory / _REMOVING)
            filesystem.remove(self.directory / _REMOVING)
            self._metrics.pop(slot, None)
            self.damaged.pop(slot, None)

    def best(self) -> Slot | None:
        """The best checkpoint there is."""
        return self._best_of([slot for slot in slots(self.directory) if slot not in self.damaged])

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be better than all there are."""
        best = self.best()
        return self._best is not None and self._best.better(metrics, {} if best is None else self._metrics_of(best))

    def _best_of(self, candidates: Sequence[Slot]) -> Slot | None:
        return self._best.among({slot: self._metrics_of(slot) for slot in candidates}) if self._best else None

    def _metrics_of(self, slot: Slot) -> dict[str, float]:
        if slot not in self._metrics:
            with contextlib.suppress(CheckpointError):
                self._metrics[slot] = read_manifest(self.directory / slot.name).metrics
        return self._metrics.get(slot, {})

    def _discard(self) -> None:
        """Removes what a process left that was killed while it wrote."""
        for name in set(filesystem.names(self.directory)) & {_WRITING, _REMOVING}:
            filesystem.remove(self.directory / name)

    def _failure(self, error: OSError, slot: Slot, needed: int) -> str:
        if (self.directory / slot.name).exists():
            return f"{slot.name} was written to {self.directory}, but not all after it was done: {error}."
        where = f" ({error.filename})" if error.filename else ""
        message = f"{slot.name} was not written to {self.directory}: {error.strerror}{where}."
        if error.errno in _FULL:
            message += f" It needs {needed:,} bytes. The disk, or what may be written to it, is full: make room."
        return message + " The checkpoints that were there still are."


def slots(directory: Path) -> list[Slot]:
    """The checkpoints in a directory, oldest first; whole ones and damaged ones."""
    return sorted(slot for name in filesystem.names(directory) if (slot := Slot.of(name)) is not None)


def valid_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory, oldest first, left out those whose files are missing or cut off."""
    return sorted({slot.step for slot in slots(directory) if _looks_whole(directory / slot.name)})


def _looks_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint.

    Args:
        path: Its directory.

    Raises:
        CheckpointError: It is damaged, or is not what its name says.
    """
    return _read(path, _manifest(path))


def _manifest(path: Path) -> Manifest:
    return named_rightly(path, read_manifest(path))


def named_rightly(path: Path, manifest: Manifest) -> Manifest:
    """The manifest, if it is that of the step in the name of the directory.

    Raises:
        CheckpointError: It is another's.
    """
    slot = Slot.of(path.name)
    if slot is not None and slot.step != manifest.step:
        raise CheckpointError(
            f"HL541: {path} holds the checkpoint of step {manifest.step}, and not of the one in its name."
        )
    return manifest


def _read(path: Path, manifest: Manifest) -> Checkpoint:
    arrays, contents = read_arrays(path, manifest), read_contents(path, manifest)
    return Checkpoint(path, manifest.step, arrays, contents, manifest.metrics)


def read_newest(
    directory: Path, check: Callable[[Manifest], None] | None = None, step: int | None = None
) -> tuple[Checkpoint | None, dict[Slot, CheckpointError]]:
    """Reads the newest checkpoint that is whole.

    Args:
        directory: Where they are.
        check: Is given the manifest before any array is read, and may refuse it. What it raises is raised: a checkpoint
            of something else is no damaged one.
        step: Of which step, if not of any.

    Returns:
        The checkpoint (`None` if there is none at all), and what is wrong with the newer ones.

    Raises:
        CheckpointError: There are some, and none is whole.
    """
    damaged: dict[Slot, CheckpointError] = {}
    tried: set[Slot] = set()
    # Again and again, as a writer may have moved on.
    while rest := [slot for slot in slots(directory) if slot not in tried and step in (None, slot.step)]:
        slot, path = rest[-1], directory / rest[-1].name
        tried.add(slot)
        try:
            manifest = _manifest(path)
        except CheckpointError as error:
            _note(path, slot, error, damaged)
            continue
        if check is not None:
            check(manifest)
        try:
            return _read(path, manifest), damaged
        except CheckpointError as error:
            _note(path, slot, error, damaged)
    if damaged:
        raise CheckpointError(f"HL542: No checkpoint in {directory} is whole. " + " ".join(map(str, damaged.values())))
    return None, {}


def _note(path: Path, slot: Slot, error: CheckpointError, damaged: dict[Slot, CheckpointError]) -> None:
    if path.exists():  # Else a writer has just removed it, and a newer one is there.
        damaged[slot] = error
