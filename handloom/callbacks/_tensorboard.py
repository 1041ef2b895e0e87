"""Scalars and profiles for TensorBoard, on every backend."""

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
    """Writes reported values and learning rates for TensorBoard. TensorFlow is not needed.

    The layout is that of `keras.callbacks.TensorBoard`: two runs, `train` and `validation`, with `epoch_<name>` against
    the number of the epoch, `batch_<name>` (the values so far) against that of the step, and
    `evaluation_<name>_vs_iterations` against that of the step at which validation ran. `epoch_learning_rate` is the
    rate at the end of the epoch; optimizers by name have one each, `epoch_learning_rate_<name>`. Unlike Keras, it
    writes no graphs, histograms or images.

    It needs tensorboardX: `pip install "handloom[tensorboard]"`. Profiles are shown by plugins: xprof for those of JAX
    and TensorFlow, in `train/plugins/profile`; torch-tb-profiler for `train/*.pt.trace.json` of PyTorch.

    Args:
        log_dir: The directory for both runs.
        every: When to write: at the end of epochs, or, with `hl.every(steps=...)`, also within them. It replaces the
            `update_freq` of Keras.
        profile_batch: The step to trace, or the first step and the last, as `(10, 20)`, counted from 1 over the whole
            training. If steps are dispatched together, it traces the dispatches that begin there. 0 for none.

    Raises:
        ExtraNotInstalledError: tensorboardX is not installed.
        ArgumentError: `profile_batch` or `every` is something else.

    Example:
        `model.fit(x, y, callbacks=[TensorBoard("logs", every=hl.every(steps=100))])`, then `tensorboard --logdir logs`
    """

    def __init__(
        self, log_dir: str | Path = "logs", *, every: Every = every(epochs=1), profile_batch: int | tuple[int, int] = 0
    ) -> None:
        check_every(every, "every", "hl.every(epochs=1)")
        super().__init__(every)
        self._epochs = every.epochs or 1
        self._new_writer = _writer_class()
        self._log_dir = Path(log_dir)
        self._writers: dict[str, Any] = {}
        self._step = 0
        self._profile = Profile(profile_batch, self._log_dir / "train")
        if profile_batch != 0:  # Hooks that the run calls at each step only if they are there.
            self.on_train_batch_begin = self._profile.on_train_batch_begin
            self.on_train_batch_end = self._profile.on_train_batch_end

    def read(self, event: Event) -> None:
        """Writes the event."""
        if event.kind == "run_begin":
            self._trains = event.data["activity"] == "fit"
            if self._trains:
                self._profile.begin_run(event.step)
        if self._trains:
            self._step = event.step
        if event.kind == "progress" and self._trains:
            self._write("train", "batch_{}", event.values, event.step)
        elif event.kind == "validation":  # Outside of training, the weights are those after the last step.
            self._write("validation", "evaluation_{}_vs_iterations", event.values, self._step)
        elif event.kind == "epoch" and event.epoch % self._epochs == 0:
            values = learning_rates(self.model) | dict(event.values)
            validation = {name: values.pop(name) for name in [*values] if name.startswith("val_")}
            self._write("train", "epoch_{}", values, event.epoch - 1)
            validation = {name.removeprefix("val_"): value for name, value in validation.items()}
            self._write("validation", "epoch_{}", validation, event.epoch - 1)

    def state(self) -> dict[str, Any]:
        """Whether the profile is written."""
        return {"profiled": self._profile.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from a state: steps that are profiled already are not profiled again."""
        self._profile.done = state["profiled"]

    def close(self) -> None:
        """Closes the files."""
        self._profile.stop()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _write(self, run: str, tag: str, values: Mapping[str, Any], step: int) -> None:
        scalars = {name: value for name, value in values.items() if np.ndim(value) == 0 and not isinstance(value, str)}
        if not scalars:
            return
        if run not in self._writers:
            # By default, files are named by the second, and two short runs would share one.
            suffix = f".{time.time_ns()}"
            self._writers[run] = self._new_writer(str(self._log_dir / run), filename_suffix=suffix)
        for name, value in scalars.items():
            self._writers[run].add_scalar(tag.format(name), float(value), step)
        self._writers[run].flush()


def _writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ExtraNotInstalledError(
            "HL903: TensorBoard needs tensorboardX, which is not installed.",
            fix='Install it with: pip install "handloom[tensorboard]".',
        ) from error
    return SummaryWriter
