"""Scalars and profiles for TensorBoard, on every backend."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handloom._util.every import Every, every
from handloom.callbacks._learning_rates import learning_rates
from handloom.callbacks._periodic import Periodic
from handloom.callbacks._profile import Profile
from handloom.errors import ExtraNotInstalledError


class TensorBoard(Periodic):
    """Writes what is reported, and the learning rates, as TensorBoard reads it. TensorFlow is not needed.

    The layout is that of `keras.callbacks.TensorBoard`: two runs, `train` and `validation`, in which `epoch_<name>`
    stands over the number of the epoch, `batch_<name>` (the values so far) over that of the step, and
    `evaluation_<name>_vs_iterations` over that of the step at which validation ran. `epoch_learning_rate` is the rate
    at the end of the epoch; optimizers by name have one each, `epoch_learning_rate_<name>`. Other than with Keras,
    there are no graphs, histograms or images.

    Needs tensorboardX: `pip install "handloom[tensorboard]"`. What shows a profile is a plugin: xprof for those of JAX
    and TensorFlow, in `train/plugins/profile`, torch-tb-profiler for `train/*.pt.trace.json` of PyTorch.

    Args:
        log_dir: The directory for both runs.
        every: When to write: at the end of epochs, or, with `hl.every(steps=...)`, also within them. It stands for
            Keras's `update_freq`.
        profile_batch: Which steps to trace, counted from 1 over the whole training: one, or the first and the last,
            as `(10, 20)`. Of steps that are dispatched together, those dispatches that begin there. 0 for none.

    Raises:
        ImportError: If tensorboardX is not installed.
        ValueError: If `profile_batch` says nothing of the kind.

    Example:
        `model.fit(x, y, callbacks=[TensorBoard("logs", every=hl.every(steps=100))])`, then `tensorboard --logdir logs`
    """

    def __init__(
        self,
        log_dir: str | Path = "logs",
        *,
        every: Every = every(epochs=1),
        profile_batch: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(every)
        self._new_writer = _writer_class()
        self._log_dir = Path(log_dir)
        self._writers: dict[str, Any] = {}
        self._profile = Profile(profile_batch, self._log_dir / "train") if profile_batch != 0 else None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        if self._profile:
            self._profile.start_over()

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._profile:
            self._profile.begin(self.progress.step + 1)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        if self._profile:
            # Not `logs or {}`: to ask whether they are empty waits for the device.
            self._profile.end(self.progress.step, {} if logs is None else logs)

    def within_epoch(self, logs: Mapping[str, Any]) -> None:
        self._write("train", {f"batch_{name}": value for name, value in logs.items()}, self.progress.step)

    def end_of_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        reported = learning_rates(self.model) | logs
        validation = {name.removeprefix("val_"): value for name, value in logs.items() if name.startswith("val_")}
        training = {name: value for name, value in reported.items() if not name.startswith("val_")}
        self._write("train", {f"epoch_{name}": value for name, value in training.items()}, epoch)
        self._write("validation", {f"epoch_{name}": value for name, value in validation.items()}, epoch)

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        values = {f"evaluation_{name}_vs_iterations": value for name, value in (logs or {}).items()}
        self._write("validation", values, self.progress.step)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; also called when training ends by an exception."""
        if self._profile:
            self._profile.stop()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def state(self) -> dict[str, Any]:
        """What the callback carries between hooks, as JSON values."""
        return super().state() | {"profiled": self._profile is not None and self._profile.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there; to be called after `on_train_begin`. What has been profiled is not profiled again."""
        super().restore(state)
        if self._profile:
            self._profile.done = state["profiled"]

    def _write(self, run: str, values: Mapping[str, Any], step: int) -> None:
        scalars = {name: value for name, value in values.items() if _is_number(value)}
        if scalars and run not in self._writers:
            # Named by the second alone, files of two short runs would be one.
            suffix = f".{time.time_ns()}"
            self._writers[run] = self._new_writer(str(self._log_dir / run), filename_suffix=suffix)
        for name, value in scalars.items():
            self._writers[run].add_scalar(name, float(value), step)
        if scalars:
            self._writers[run].flush()


def _is_number(value: Any) -> bool:
    return np.ndim(value) == 0 and not isinstance(value, str)


def _writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ExtraNotInstalledError(
            "HL903", 'TensorBoard needs tensorboardX, which is not installed: pip install "handloom[tensorboard]".'
        ) from error
    return SummaryWriter
