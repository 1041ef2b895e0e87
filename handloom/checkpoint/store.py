"""A directory of checkpoints: at every instant it holds a complete one, and the newest complete one is read.

step_000000100/    a checkpoint; if the same step is saved again later, step_000000100_1
.writing/          an unfinished checkpoint; .removing/ one that is being removed
.lock              held by the process that writes
"""

import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Mapping
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
        path: The directory that it was read from.
        step: The step at which it was saved.
        arrays: Name to NumPy array.
        contents: Everything else, as JSON values.
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
        seconds: The time that writing took in the background.
        seconds_waited: The time for which `save` held up the steps before that.
    """

    step: int
    bytes: int
    seconds: float
    seconds_waited: float = 0.0


class Store:
    """Writes checkpoints to a directory and removes old ones. It knows no models, and imports no backend.

    Args:
        directory: The directory. It is created when the first checkpoint is written.
        keep: The number of last checkpoints to keep; `None` for all.
        best: The metric whose best checkpoint is kept as well.

    Attributes:
        damaged: The slots that were found damaged. They are removed after the next checkpoint is written.
    """

    def __init__(self, directory: Path, keep: int | None = 3, best: Best | None = None) -> None:
        self.directory = directory
        self.damaged: dict[Slot, CheckpointError] = {}
        self._keep, self._best = keep, best
        self._metrics: dict[Slot, dict[str, float]] = {}
        self._lock: WriterLock | None = None

    def open(self) -> None:
        """Makes sure that this process can write, and that no other process does.

        Raises:
            CheckpointError: The directory cannot be written, or another process writes to it.
        """
        try:
            if self._lock is None:
                filesystem.prepare(self.directory)
                self._lock = WriterLock(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"HL537: Checkpoints cannot be written to {self.directory}: {error.strerror}.",
                fix="Choose another directory, or make this one writable.",
            ) from error

    def close(self) -> None:
        """Lets another process write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_step(self, step: int) -> None:
        """Refuses a step before the last one: its checkpoint would count as the older one, and soon be removed.

        Raises:
            CheckpointError: There is a checkpoint of a later step, which is not known to be damaged.
        """
        later = [slot for slot in self._sound() if slot.step > step]
        if later:
            raise CheckpointError(
                f"HL538: Step {step} cannot be saved: {self.directory} holds {later[-1].name}, which is later.",
                fix="Resume from it with restore(), choose another directory, or remove it.",
            )

    def save(self, draft: Draft) -> Written:
        """Writes a checkpoint; then, and only then, removes those that are not to be kept.

        Raises:
            CheckpointError: The checkpoint could not be written. The earlier ones are intact.
        """
        begun = time.perf_counter()
        self.open()
        self.check_step(draft.step)
        again = [slot.again + 1 for slot in slots(self.directory) if slot.step == draft.step]
        slot = Slot(draft.step, max(again, default=0))
        try:
            self._write(draft, slot)
        except OSError as error:
            raise CheckpointError(
                f"HL539: {slot.name} was not written to {self.directory}: {error.strerror}"
                f"{f' ({error.filename})' if error.filename else ''}.",
                "The earlier checkpoints are intact.",
                f"Free space on the disk, or raise your limits: the checkpoint needs {draft.bytes:,} bytes."
                if error.errno in _FULL
                else "",
            ) from error
        try:
            filesystem.sync(self.directory)
            self._prune(slot)
        except OSError as error:
            raise CheckpointError(
                f"HL556: {slot.name} was written to {self.directory}, but flushing the directory or removing older "
                f"checkpoints failed: {error}."
            ) from error
        return Written(draft.step, draft.bytes, time.perf_counter() - begun)

    def _write(self, draft: Draft, slot: Slot) -> None:
        unfinished = self.directory / _WRITING
        for name in set(filesystem.names(self.directory)) & {_WRITING, _REMOVING}:  # Left by a killed process.
            filesystem.remove(self.directory / name)
        missing = draft.bytes - filesystem.free_bytes(self.directory)
        if missing > 0:
            raise OSError(errno.ENOSPC, f"{missing:,} bytes are missing")
        try:
            filesystem.make(unfinished)
            draft.write(unfinished)
            filesystem.sync(unfinished)
            filesystem.rename(unfinished, self.directory / slot.name)
        except BaseException as error:
            with contextlib.suppress(OSError):
                filesystem.remove(unfinished)
            if isinstance(error, CheckpointError):
                raise CheckpointError(
                    f"HL540: {slot.name} was not written to {self.directory}: reading it back failed. {error}",
                    "The earlier checkpoints are intact.",
                ) from error
            raise
        self._metrics[slot] = draft.metrics

    def _prune(self, new: Slot) -> None:
        self.damaged.pop(new, None)
        for slot in {*slots(self.directory)} - kept(self._sound(), self._keep, self.best()):
            # Renamed first: a checkpoint that is half removed would look like a damaged one.
            filesystem.rename(self.directory / slot.name, self.directory / _REMOVING)
            filesystem.remove(self.directory / _REMOVING)
            self._metrics.pop(slot, None)
            self.damaged.pop(slot, None)

    def _sound(self) -> list[Slot]:
        """The checkpoints that are not known to be damaged, oldest first."""
        return [slot for slot in slots(self.directory) if slot not in self.damaged]

    def best(self) -> Slot | None:
        """The best checkpoint in the directory."""
        return self._best.among({slot: self._metrics_of(slot) for slot in self._sound()}) if self._best else None

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be better than all in the directory."""
        best = self.best()
        return self._best is not None and self._best.better(metrics, self._metrics_of(best) if best else {})

    def _metrics_of(self, slot: Slot) -> dict[str, float]:
        if slot not in self._metrics:
            with contextlib.suppress(CheckpointError):
                self._metrics[slot] = read_manifest(self.directory / slot.name).metrics
        return self._metrics.get(slot, {})


def slots(directory: Path) -> list[Slot]:
    """The checkpoints in a directory, complete or damaged, oldest first."""
    return sorted(slot for name in filesystem.names(directory) if (slot := Slot.of(name)) is not None)


def valid_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory, oldest first, without those with missing or cut-off files."""
    found = set()
    for slot in slots(directory):
        with contextlib.suppress(CheckpointError):
            found.add(read_manifest(directory / slot.name).step)
    return sorted(found)


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint.

    Args:
        path: Its directory.

    Raises:
        CheckpointError: The checkpoint is damaged, or is of another step than its name says.
    """
    return _read(path, read_manifest(path))


def _read(path: Path, manifest: Manifest) -> Checkpoint:
    arrays, contents = read_arrays(path, manifest), read_contents(path, manifest)
    return Checkpoint(path, manifest.step, arrays, contents, manifest.metrics)


def read_newest(
    directory: Path, check: Callable[[Manifest], None] = lambda _: None, step: int | None = None
) -> tuple[Checkpoint | None, dict[Slot, CheckpointError]]:
    """Reads the newest complete checkpoint.

    Args:
        directory: The directory of the checkpoints.
        check: Called with the manifest before any array is read. Its errors are raised: a checkpoint of another model
            is not a damaged one.
        step: The step to read; by default any.

    Returns:
        The checkpoint (`None` if there is none at all), and the errors of the newer, damaged ones.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    damaged: dict[Slot, CheckpointError] = {}
    tried: set[Slot] = set()
    # List the directory again each time: a writer may have removed and added checkpoints.
    while rest := [slot for slot in slots(directory) if slot not in tried and step in (None, slot.step)]:
        slot, path = rest[-1], directory / rest[-1].name
        tried.add(slot)
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            _note(slot, path, error, damaged)
            continue
        check(manifest)
        try:
            return _read(path, manifest), damaged
        except CheckpointError as error:
            _note(slot, path, error, damaged)
    if damaged:
        errors = " ".join(map(str, damaged.values()))
        raise CheckpointError(f"HL542: All checkpoints in {directory} are damaged.", errors)
    return None, {}


def newest_contents(directory: Path) -> dict[str, Any]:
    """The JSON values of the newest checkpoint whose table and values are sound; empty if there is none."""
    for slot in reversed(slots(directory)):
        with contextlib.suppress(CheckpointError):
            return read_contents(directory / slot.name, read_manifest(directory / slot.name))
    return {}


def _note(slot: Slot, path: Path, error: CheckpointError, damaged: dict[Slot, CheckpointError]) -> None:
    if path.exists():  # Otherwise a writer has just removed it, and there is a newer one.
        damaged[slot] = error
