"""Scalars and profiles for TensorBoard, on every backend."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handloom._util.every import Every, check_every, every
from handloom.callbacks._event_reader import Event, EventReader
from handloom.callbacks._learning_rates import learning_rates
from handloom.callbacks._profile import Profile
from handloom.errors import ExtraNotInstalledError


class TensorBoard(EventReader):
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
        check_every(every, "every", "hl.every(epochs=1)")
        super().__init__(every)
        self._epochs = every.epochs or 1
        self._new_writer = _writer_class()
        self._log_dir = Path(log_dir)
        self._writers: dict[str, Any] = {}
        self._step = self._taken = 0
        self._profile = Profile(profile_batch, self._log_dir / "train") if profile_batch != 0 else None
        if self._profile:  # Only then is there anything to do at each step.
            self.on_train_batch_begin, self.on_train_batch_end = self._begin_profile, self._end_profile

    def read(self, event: Event) -> None:
        """Writes what is new."""
        if event.kind == "run_begin":
            self._trains = event.data["activity"] == "fit"
            if self._trains:
                self._taken = event.step
                if self._profile and not event.step:
                    self._profile.start_over()
        if self._trains:
            self._step = event.step
        if event.kind == "progress" and self._trains:
            self._write("train", {f"batch_{name}": value for name, value in event.values.items()}, event.step)
        elif event.kind == "validation":  # Outside of training it is of the weights that training left.
            values = {f"evaluation_{name}_vs_iterations": value for name, value in event.values.items()}
            self._write("validation", values, self._step)
        elif event.kind == "epoch" and event.epoch % self._epochs == 0:
            self._write_epoch(event.epoch - 1, event.values)

    def _write_epoch(self, epoch: int, values: Mapping[str, Any]) -> None:
        reported = learning_rates(self.model) | dict(values)
        validation = {name.removeprefix("val_"): value for name, value in values.items() if name.startswith("val_")}
        training = {name: value for name, value in reported.items() if not name.startswith("val_")}
        self._write("train", {f"epoch_{name}": value for name, value in training.items()}, epoch)
        self._write("validation", {f"epoch_{name}": value for name, value in validation.items()}, epoch)

    def _begin_profile(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        assert self._profile is not None
        self._first = batch
        self._profile.begin(self._taken + 1)

    def _end_profile(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        assert self._profile is not None
        self._taken += batch + 1 - self._first
        # Not `logs or {}`: to ask whether they are empty waits for the device.
        self._profile.end(self._taken, {} if logs is None else logs)

    def state(self) -> dict[str, Any]:
        """Whether the profile has been taken."""
        return {"profiled": self._profile is not None and self._profile.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes: what has been profiled is not profiled again."""
        if self._profile:
            self._profile.done = state["profiled"]

    def close(self) -> None:
        """Closes the files."""
        if self._profile:
            self._profile.stop()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

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
            'HL903: TensorBoard needs tensorboardX, which is not installed: pip install "handloom[tensorboard]".'
        ) from error
    return SummaryWriter
