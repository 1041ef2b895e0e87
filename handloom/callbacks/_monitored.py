"""The base of callbacks that watch one reported value, which may be missing or NaN."""

import math
import operator
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from handloom._keras import direction_of, keras
from handloom._util.findings import warn
from handloom.callbacks._state import Stateful
from handloom.errors import ArgumentError

_WORST = sys.float_info.max  # Not infinity, which JSON lacks.


class Monitored(Stateful, keras.callbacks.Callback):
    """A mixin, to be listed before a callback of Keras that has `monitor`, `mode` and `min_delta`."""

    min_delta: float
    monitor_op: Any
    best: float | None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._missed = False
        self._found = False

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        if self._missed and not self._found:
            self._warn_of_missing("in no epoch", logs or {})

    def settle_direction(self) -> None:
        """Decides which direction is better, once the metrics exist."""
        if self.monitor_op is None:
            up = _more_is_better(self)
            self.monitor_op = operator.gt if up else operator.lt
            self.min_delta = abs(self.min_delta) * (1 if up else -1)

    def watched(self, logs: Mapping[str, Any]) -> float | None:
        """The value to watch; `None` if this epoch has none. NaN becomes the worst of all numbers."""
        value = logs.get(self.monitor)
        if value is None:
            # Validation may be less frequent than epochs; then the value may still come.
            may_come = self.monitor.startswith("val_") and not any(name.startswith("val_") for name in logs)
            if not may_come and not self._missed:
                self._warn_of_missing("in this epoch", logs)
                self._found = True  # Warn once.
            self._missed = True
            return None
        self._found = True
        worst = -_WORST if self.monitor_op is operator.gt else _WORST
        return worst if math.isnan(value) else min(max(float(value), -_WORST), _WORST)

    def _warn_of_missing(self, when: str, logs: Mapping[str, Any]) -> None:
        warn(
            f"HL758: {type(self).__name__} watches {self.monitor!r}, which was reported {when}, so it does nothing.",
            fix=f"Choose a reported value with monitor=: {', '.join(map(repr, logs)) or 'there is none'}.",
        )


def _more_is_better(callback: Monitored) -> bool:
    if callback.mode != "auto":
        return bool(callback.mode == "max")
    name = callback.monitor.removeprefix("val_")
    if name == "loss" or name.endswith("_loss"):
        return False
    for metric in _metrics(callback.model):
        direction = direction_of(metric)
        if direction is not None and (name == metric.name or name.endswith(f"_{metric.name}")):
            return direction == "up"
    raise ArgumentError(
        f"HL705: {type(callback).__name__} cannot tell whether more or less of {callback.monitor!r} is better.",
        fix='Add mode="max" or mode="min".',
    )


def _metrics(owner: Any) -> Iterator[keras.Metric]:
    """All metrics, including those that a compiled model keeps inside another."""
    for metric in getattr(owner, "metrics", ()):
        if hasattr(metric, "metrics"):
            yield from _metrics(metric)
        yield metric
