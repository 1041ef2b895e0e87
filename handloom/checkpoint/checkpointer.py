"""`hl.Checkpointer`: when a state is saved, in the background, and restored."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import operator
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from handloom._util.findings import warn
from handloom._util.shard import Shard
from handloom.checkpoint import snapshot
from handloom.checkpoint.dtypes import is_finite
from handloom.checkpoint.filesystem import lower_priority
from handloom.checkpoint.format import Draft
from handloom.checkpoint.load import warn_of
from handloom.checkpoint.retention import Best
from handloom.checkpoint.store import Store, Written, read_newest, valid_steps
from handloom.errors import ArgumentError, CheckpointError


class Checkpointer:
    """Saves a state now and then, and restores it: the whole state, to the last bit, or not at all.

    A checkpoint is there when it is on the disk and has been read back; only then do older ones go. A process killed at
    any instant leaves the last one whole. Saving waits for the state to be copied, and for the checkpoint before;
    the rest happens in the background. What fails there is raised by the next call, so close at the end.

    Args:
        directory: Where. One process at a time writes to it.
        state: What is saved, by name: models, optimizers, feeds, NumPy arrays, whatever has `state()` and `restore()`.
            Where the random numbers of Python, NumPy, Keras and the backend stand is saved besides.
        keep: How many of the last checkpoints to keep; `None` for all.
        best: `"min:NAME"` or `"max:NAME"` of a metric given to `save`, by which the best is kept besides.
        finite: Whether to refuse a state with numbers that are NaN or infinite: a warning names them, and the last good
            checkpoint stays the newest.

    Attributes:
        directory: Where the checkpoints are.
        state: What is saved.
        written: The last checkpoint known to be on the disk: its `step`, `bytes`, and the `seconds` that writing took
            in the background, and for how many `save` had the steps wait. `None` before the first.
        restored: What `restore` put back and what it did not, by name; nothing before.

    Raises:
        ValueError: `keep` is not positive, or `best` is no direction and name.

    Example:
        ```python
        with hl.Checkpointer("run", {"model": model, "optimizer": optimizer}) as checkpointer:
            for step in range(checkpointer.restore() or 0, 10_000):
                train_step(*next(batches))
                if (step + 1) % 500 == 0:
                    checkpointer.save(step + 1)
        ```
    """

    def __init__(
        self,
        directory: str | Path,
        state: Mapping[str, Any],
        *,
        keep: int | None = 3,
        best: str | None = None,
        finite: bool = True,
    ) -> None:
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise ArgumentError(f"HL018: keep= takes a positive whole number, or None to keep all; received {keep!r}.")
        self.directory = Path(directory)
        self.state = state
        self.written: Written | None = None
        self.restored = snapshot.Restored()
        self._finite = finite
        self._best = Best.of(best) if best is not None else None
        self._store = Store(self.directory, keep, self._best)
        self._metrics: set[str] = set()
        self._pending: _Pending | None = None
        self._copied: dict[str, list[Shard]] = {}

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, oldest first; not those that are evidently damaged."""
        return valid_steps(self.directory)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, by the metric that `best` names; `None` if none has it. Waits too."""
        self.wait()
        best = self._store.best()
        return None if best is None else best.step

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a state saved with these metrics would be the best there is; waits for the one before.

        For loops that save now and then, and whenever it gets better.
        """
        self.wait()
        return self._store.is_best(_numbers(metrics))

    def save(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Copies the state, and writes it in the background.

        With `finite`, a state that is not finite is not saved; a `HandloomWarning` says so.

        Args:
            step: How many steps have been taken. Checkpoints are ordered by it; a step saved again replaces the first.
            metrics: Name to number, for `best` and for the record.

        Raises:
            CheckpointError: The one before could not be written; or this one cannot be, as the directory is read-only,
                another process writes to it, it holds a later step, or something in the state cannot be saved.
        """
        begun = time.perf_counter()
        self.wait()
        step = _step(step)
        self._store.open()
        self._store.check_step(step)
        numbers = _numbers(metrics or {})
        self._copied, contents = snapshot.take(self.state, self._copied)
        if self._finite and (names := _not_finite(self._copied)):
            warn(
                f"HL501: The state at step {step} is not saved: NaN or infinity in {', '.join(names[:3])}"
                f"{' and more' if len(names) > 3 else ''}. The checkpoints before stay. If it is meant to be there, "
                "use finite=False.",
            )
            return
        draft = Draft(step, [self._copied], contents, numbers)
        self._metrics |= numbers.keys()
        # A thread for each, which ends by itself; the interpreter waits for it at its exit.
        executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="handloom-checkpoint")
        written = executor.submit(_in_background, self._store, draft)
        self._pending = _Pending(step, written, time.perf_counter() - begun)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            CheckpointError: It could not be written; names its step.
        """
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending.written])  # Apart from the result: an interrupt must not lose it.
        pending, self._pending = self._pending, None
        try:
            self.written = dataclasses.replace(pending.written.result(), seconds_waited=pending.seconds_waited)
        except Exception as error:
            raise CheckpointError(f"HL502: Saving the checkpoint of step {pending.step} failed. {error}") from error

    def check(self) -> None:
        """Takes note of whether the last checkpoint is on the disk by now; does not wait. Raises what `wait` does."""
        if self._pending is not None and self._pending.written.done():
            self.wait()

    def restore(self, step: int | None = None, *, allow: Sequence[str] = ()) -> int | None:
        """Gives the state what the newest whole checkpoint holds, or that of a step.

        A damaged one is passed over for the one before, with a `HandloomWarning` that names file and array.

        Args:
            step: Which one, such as `checkpointer.best_step`; by default the newest.
            allow: Patterns of names that may be missing, left over, or of another shape: `["model.head.*"]`. What is
                missing stays as it is.

        Returns:
            Its step; `None` if there is no checkpoint.

        Raises:
            CheckpointError: There are some and none is whole; or there is none of that step; or it is the checkpoint
                of something else: names what is missing, not expected, or of another shape. Nothing has been restored
                then.
        """
        self.wait()
        found, damaged = read_newest(
            self.directory, lambda manifest: snapshot.check(self.state, manifest.shapes, allow), step
        )
        if found is None and step is not None:
            known = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"HL503: {self.directory} holds no checkpoint of step {step}; there are {known}.")
        if found is None:
            return None
        self._store.damaged |= damaged
        warn_of(damaged, found)
        self.restored = snapshot.put(self.state, found.arrays, found.contents, allow)
        return found.step

    def close(self) -> None:
        """Waits as `wait` does, and lets another process write."""
        try:
            self.wait()
        finally:
            if self._pending is None:  # Else an interrupt came, and a thread is still writing.
                self._store.close()
        if self._best and self._metrics and self._best.metric not in self._metrics:
            warn(
                f"HL504: No best checkpoint was kept: best= asks for {self._best.metric!r}, and the metrics that save() was "
                f"given are {', '.join(sorted(self._metrics))}.",
            )
            self._metrics.clear()  # Once is enough.

    def __enter__(self) -> Checkpointer:
        self._store.open()  # A directory that cannot be written is better found before training than after.
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # The user's own error comes first.


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written: its step, what it will have taken, and how long `save` took to begin it."""

    step: int
    written: concurrent.futures.Future[Written]
    seconds_waited: float


def _in_background(store: Store, draft: Draft) -> Written:
    lower_priority()  # A step on all cores is as slow as its slowest thread.
    return store.save(draft)


def _not_finite(shards: Mapping[str, Sequence[Shard]]) -> list[str]:
    """The variables that are not; what a log or a callback remembers may be anything."""
    variables = {name: parts for name, parts in shards.items() if not name.startswith(snapshot.OF_STATE)}
    return [name for name, parts in variables.items() if not all(is_finite(part.value) for part in parts)]


def _step(step: Any) -> int:
    if isinstance(step, (bool, np.bool_)):
        raise ArgumentError(f"HL019: save() takes the number of a step; received {step!r}.")
    number = operator.index(step)
    if not 0 <= number < 10**18:
        raise ArgumentError(f"HL020: save() takes the number of a step, 0 or more; received {step!r}.")
    return number


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise ArgumentError(f"HL021: save() takes numbers as metrics; {name!r} is {value!r:.80}.") from None
    return numbers
