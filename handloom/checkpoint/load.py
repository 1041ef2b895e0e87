"""`hl.load_checkpoint`: what is in a checkpoint, without a model and without a backend."""

from __future__ import annotations

from pathlib import Path

from handloom._util.findings import warn
from handloom.checkpoint.manifest import MANIFEST
from handloom.checkpoint.retention import OF_RUN, Slot
from handloom.checkpoint.store import Checkpoint, read, read_newest, slots
from handloom.errors import CheckpointError


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint as names and arrays.

    Every byte is verified; nothing in it is run or looked up. No backend is imported.

    Args:
        path: A checkpoint, such as `run/checkpoints/step_000000120`, or a directory of them, or a run's directory; of
            several the newest that is whole is read, and a damaged one that is passed over is named in a
            `HandloomWarning`.

    Returns:
        An object with `step`, `arrays` (name to NumPy array; bfloat16 and float8 of the types of `ml_dtypes`),
        `contents` (what is saved beside arrays, as JSON values), `metrics` and `path`.

    Raises:
        CheckpointError: There is none, or it is damaged: names the file and the array.
    """
    path = Path(path)
    if is_checkpoint(path):
        return read(path)
    found, damaged = read_newest(_directory(path))
    if found is None:
        raise _nothing_at(path)
    warn_of(damaged, found)
    return found


def _directory(path: Path) -> Path:
    """Where checkpoints are: a directory itself, or the one in that of a run."""
    return path / OF_RUN if (path / OF_RUN).is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Whether it is one checkpoint, whole or damaged, and not a directory of them."""
    return (Slot.of(path.resolve().name) is not None and path.is_dir()) or (path / MANIFEST).exists()


def warn_of(damaged: dict[Slot, CheckpointError], found: Checkpoint) -> None:
    """Names the damaged checkpoints that were passed over."""
    for slot, error in damaged.items():
        warn(f"HL519: {slot.name} is passed over for {found.path.name}: {error}")


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints at a path: itself, or those in it, oldest first.

    Raises:
        CheckpointError: There are none.
    """
    directory = _directory(path)
    found = [path] if is_checkpoint(path) else [directory / slot.name for slot in slots(directory)]
    if not found:
        raise _nothing_at(path)
    return found


def _nothing_at(path: Path) -> CheckpointError:
    return CheckpointError(f"HL520: There is no checkpoint at {path}, nor are there any in it.")
