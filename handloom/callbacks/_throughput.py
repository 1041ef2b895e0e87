"""The speed of training."""

import time
from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom.callbacks._state import Stateful


class Throughput(Stateful, keras.callbacks.Callback):
    """Adds the speed of each epoch to its reports.

    `steps_per_second` and `examples_per_second` (by the first axis of the first array in a batch) count the time of
    training alone, without validation and compilation. `data_wait` is the share of that time, from 0 to 1, in which the
    loop waited for its next batch; the device may have been busy meanwhile. The callback reads the clock at each step,
    but never waits for the device: at the end of an epoch the results are there.

    The callbacks after this one, the history, the log and the display see these values, so give it first.
    """

    takes_executions = True  # See `Callbacks.each_step`.

    def __init__(self) -> None:
        super().__init__()
        self.on_epoch_begin(0)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._begun = self._ready = self._test_begun = time.perf_counter()
        self._first, self._steps, self._waited = 0, 0, 0.0
        self._reported: Any = None

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._first = batch
        self._waited += time.perf_counter() - self._ready

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._steps += batch + 1 - self._first
        self._reported = getattr(logs, "epoch", None)  # Keras's own loop has none.
        self._ready = time.perf_counter()

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._test_begun = time.perf_counter()

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        validating = time.perf_counter() - self._test_begun
        # The epoch, and the wait for the next batch, then seem to begin that much later.
        self._begun += validating
        self._ready += validating

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is None or not self._steps:
            return
        compiling = getattr(self._reported, "seconds_compiling", 0.0)
        seconds = max(time.perf_counter() - self._begun - compiling, 1e-9)
        logs["steps_per_second"] = self._steps / seconds
        if self._reported is not None:
            logs["examples_per_second"] = self._reported.examples / seconds
        logs["data_wait"] = min(self._waited / seconds, 1.0)
