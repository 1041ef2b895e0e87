"""`hl.load_checkpoint`: the contents of a checkpoint, without a model and without a backend."""

from pathlib import Path

from handloom._util.findings import warn
from handloom.checkpoint.manifest import MANIFEST
from handloom.checkpoint.retention import OF_RUN, Slot
from handloom.checkpoint.store import Checkpoint, read, read_newest, slots
from handloom.errors import CheckpointError


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint as names and arrays.

    Every byte is verified; no code from the file runs, and no class is looked up. No backend is imported.

    Args:
        path: A checkpoint, such as `run/checkpoints/step_000000120`, a directory of checkpoints, or a run directory. Of
            several checkpoints, the newest complete one is read; a `HandloomWarning` names the damaged ones it skips.

    Returns:
        An object with `step`, `arrays` (name to NumPy array; bfloat16 and float8 have the dtypes of `ml_dtypes`),
        `contents` (everything else, as JSON values), `metrics` and `path`.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged: the message names the file and the array.
    """
    path = Path(path)
    if _is_checkpoint(path):
        return read(path)
    found, damaged = read_newest(_directory(path))
    if found is None:
        raise _nothing_at(path)
    warn_of(damaged, found)
    return found


def _directory(path: Path) -> Path:
    """The directory of checkpoints: the path itself, or the one in a run directory."""
    return path / OF_RUN if (path / OF_RUN).is_dir() else path


def _is_checkpoint(path: Path) -> bool:
    """Whether a path is one checkpoint, complete or damaged, and not a directory of them."""
    return (Slot.of(path.resolve().name) is not None and path.is_dir()) or (path / MANIFEST).exists()


def warn_of(damaged: dict[Slot, CheckpointError], found: Checkpoint) -> None:
    """Warns of the damaged checkpoints that are newer than the one found."""
    for slot, error in damaged.items():
        warn(f"HL519: Skipping damaged checkpoint {slot.name}; using {found.path.name}.", str(error))


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints at a path: itself, or those in it, oldest first.

    Raises:
        CheckpointError: There are none.
    """
    directory = _directory(path)
    found = [path] if _is_checkpoint(path) else [directory / slot.name for slot in slots(directory)]
    if not found:
        raise _nothing_at(path)
    return found


def _nothing_at(path: Path) -> CheckpointError:
    return CheckpointError(f"HL520: There is no checkpoint at {path}, or in it.")
