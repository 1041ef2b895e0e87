"""`hl.Checkpointer`: saves a state in the background, and restores it."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from handloom._util.arguments import whole_number
from handloom._util.findings import warn
from handloom._util.first_few import first_few
from handloom._util.shard import Shard, Shards
from handloom._util.short import short
from handloom.checkpoint import snapshot
from handloom.checkpoint.dtypes import is_finite
from handloom.checkpoint.filesystem import lower_priority
from handloom.checkpoint.format import Draft
from handloom.checkpoint.load import warn_of
from handloom.checkpoint.retention import Best
from handloom.checkpoint.store import Store, Written, read_newest, valid_steps
from handloom.errors import ArgumentError, CheckpointError


class Checkpointer:
    """Saves a state when asked to, and restores it bitwise identical, all of it or nothing.

    A checkpoint counts when it is on disk and has been read back; only then are older ones removed. A process killed at
    any instant leaves the last checkpoint intact. `save` waits for a copy of the state, and for the checkpoint before
    it; the rest happens in the background. An error there is raised by the next call, so close at the end.

    Args:
        directory: The directory. One process at a time writes to it.
        state: The objects to save, by name: models, optimizers, feeds, NumPy arrays, and objects with `state()` and
            `restore(state)`, in dicts and lists. The states of the random number generators of Python, NumPy, Keras and
            the backend are saved as well.
        keep: The number of last checkpoints to keep; `None` for all.
        best: `"min:NAME"` or `"max:NAME"` of a metric given to `save`; the best checkpoint is then kept as well.
        finite: Whether to refuse a state with NaN or infinite numbers: a warning names them, and the last good
            checkpoint stays the newest.

    Attributes:
        directory: The directory of the checkpoints.
        state: The objects to save.
        written: The last checkpoint known to be on disk: its `step`, its `bytes`, the `seconds` that writing took in
            the background, and the `seconds_waited` for which `save` held up the steps. `None` before the first.
        restored: The names that the last `restore` restored, and those that it did not; empty before.

    Raises:
        ArgumentError: `keep` is not a positive whole number, or `best` is not a direction and a name.

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
        if keep is not None:
            whole_number("hl.Checkpointer", keep=keep)
        self.directory = Path(directory)
        self.state = state
        self.written: Written | None = None
        self.restored = snapshot.Restored()
        self._finite = finite
        self._best = Best.of(best) if best is not None else None
        self._store = Store(self.directory, keep, self._best)
        self._metrics: set[str] = set()
        self._pending: tuple[int, concurrent.futures.Future[Written]] | None = None
        self._copied: dict[str, list[Shard]] = {}

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints in the directory, oldest first, without those with missing or cut-off files."""
        return valid_steps(self.directory)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric of `best`; `None` if none has it. Waits as `wait` does."""
        self.wait()
        best = self._store.best()
        return None if best is None else best.step

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a state saved with these metrics would be the best so far. Waits as `wait` does.

        For loops that save on a schedule, and whenever the metric improves.
        """
        self.wait()
        return self._store.is_best(_numbers(metrics))

    def save(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Copies the state, and writes it in the background.

        With `finite`, a state that is not finite is not saved; a `HandloomWarning` says so.

        Args:
            step: The number of steps taken. Checkpoints are ordered by it; saving a step again replaces its checkpoint.
            metrics: Name to number, for `best` and for the record.

        Raises:
            CheckpointError: The previous checkpoint could not be written; or this one cannot be: the directory is
                read-only, another process writes to it, it holds a later step, or something in the state cannot be
                saved.
        """
        begun = time.perf_counter()
        self.wait()
        step = whole_number("Checkpointer.save", least=0, step=step)
        self._store.open()
        self._store.check_step(step)
        numbers = _numbers(metrics or {})
        self._copied, contents = snapshot.take(self.state, self._copied)
        if self._finite and (names := _not_finite(self._copied)):
            warn(
                f"HL501: The state at step {step} is not saved: NaN or infinity in {first_few(names, 3)}.",
                "The earlier checkpoints stay.",
                "If these values are intended, save with hl.Checkpointer(..., finite=False).",
            )
            return
        draft = Draft(step, [self._copied], contents, numbers)
        self._metrics |= numbers.keys()
        # A new thread each time, which ends by itself; the interpreter waits for it at exit.
        executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="handloom-checkpoint")
        self._pending = step, executor.submit(_write, self._store, draft, time.perf_counter() - begun)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            CheckpointError: It could not be written; the message names its step.
        """
        if self._pending is None:
            return
        step, writing = self._pending
        concurrent.futures.wait([writing])  # Not `result`: an interrupt here must leave it pending.
        self._pending = None
        try:
            self.written = writing.result()
        except Exception as error:
            raise CheckpointError(f"HL502: Saving the checkpoint of step {step} failed. {error}") from error

    def check(self) -> None:
        """Updates `written` if the last checkpoint is on disk by now; does not wait. Raises what `wait` raises."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def restore(self, step: int | None = None, *, allow: Sequence[str] = ()) -> int | None:
        """Restores the state from the newest complete checkpoint, or from that of a step.

        Damaged checkpoints are skipped, with a `HandloomWarning` that names file and array.

        Args:
            step: The step of the checkpoint, such as `checkpointer.best_step`; by default the newest.
            allow: Patterns of names that may be missing, left over, or of another shape: `["model.head.*"]`. Missing
                ones stay unchanged.

        Returns:
            The step of the checkpoint; `None` if there is no checkpoint.

        Raises:
            CheckpointError: All checkpoints are damaged; or there is none of that step; or the checkpoint is of another
                state: the message names what is missing, not expected, or of another shape. Nothing has been restored
                then.
        """
        self.wait()
        found, damaged = read_newest(
            self.directory, lambda manifest: snapshot.check(self.state, manifest.tensors, allow), step
        )
        if found is None:
            if step is None:
                return None
            known = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"HL503: {self.directory} has no checkpoint of step {step}; it has {known}.")
        self._store.damaged |= damaged
        warn_of(damaged, found)
        self.restored = snapshot.put(self.state, found.arrays, found.contents, allow)
        return found.step

    def close(self) -> None:
        """Waits as `wait` does, and lets another process write."""
        try:
            self.wait()
        finally:
            if self._pending is None:  # Otherwise an interrupt came, and a thread is still writing.
                self._store.close()
        if self._best and self._metrics and self._best.metric not in self._metrics:
            warn(
                f"HL504: No best checkpoint was kept: best= names {self._best.metric!r}; the metrics given to save() "
                f"were {', '.join(sorted(self._metrics))}."
            )
            self._metrics.clear()  # Warn once.

    def __enter__(self) -> Self:
        self._store.open()  # A directory that cannot be written is an error before training, not after.
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # The user's own error comes first.


def _write(store: Store, draft: Draft, seconds_waited: float) -> Written:
    lower_priority()  # A step that uses all cores is as slow as its slowest thread.
    return dataclasses.replace(store.save(draft), seconds_waited=seconds_waited)


def _not_finite(shards: Shards) -> list[str]:
    """The names of variables with values that are not finite; the states of other objects may have them."""
    variables = {name: parts for name, parts in shards.items() if not name.startswith(snapshot.OF_STATE)}
    return [name for name, parts in variables.items() if not all(is_finite(part.value) for part in parts)]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise ArgumentError(f"HL021: save() takes numbers as metrics; {name!r} is {short(value)}.") from None
    return numbers
