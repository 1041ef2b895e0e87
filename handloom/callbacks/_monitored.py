"""Callbacks that watch one reported value: which way is better, and what to make of one that is missing or NaN."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from handloom._keras import direction_of, keras
from handloom._util.findings import warn
from handloom.callbacks._state import Stateful
from handloom.errors import ArgumentError

_WORST = sys.float_info.max  # And not infinity, which JSON does not have.


class Monitored(Stateful):
    """To be mixed in before a callback of Keras's that has `monitor`, `mode` and `min_delta`."""

    monitor: str
    mode: str
    min_delta: float
    monitor_op: Callable[[float, float], bool] | None
    best: float | None
    model: Any

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)  # type: ignore[misc]
        self._missed = False
        self._found = False

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_end(logs)  # type: ignore[misc]
        if self._missed and not self._found:
            self._warn_of_missing("in no epoch", logs or {})

    def settle_direction(self) -> None:
        """Decides, once there are metrics to be asked, which way is better."""
        if self.monitor_op is None:
            up = _more_is_better(self)
            self.monitor_op = operator.gt if up else operator.lt
            self.min_delta = abs(self.min_delta) * (1 if up else -1)

    def watched(self, logs: Mapping[str, Any]) -> float | None:
        """The value that is watched, `None` if this epoch has none. Nothing is worse than NaN."""
        value = logs.get(self.monitor)
        if value is None:
            # Validation may be rarer than epochs; then there is nothing to say yet.
            awaited = self.monitor.startswith("val_") and not any(name.startswith("val_") for name in logs)
            if not awaited and not self._missed:
                self._warn_of_missing("in this epoch", logs)
                self._found = True  # It has been said.
            self._missed = True
            return None
        self._found = True
        worst = -_WORST if self.monitor_op is operator.gt else _WORST
        return worst if math.isnan(value) else min(max(float(value), -_WORST), _WORST)

    def improves(self, value: float) -> bool:
        """Whether a value is better than the best so far."""
        assert self.monitor_op is not None
        return self.best is None or self.monitor_op(value - self.min_delta, self.best)

    def _warn_of_missing(self, when: str, logs: Mapping[str, Any]) -> None:
        warn(
            f"HL704: {type(self).__name__} watches {self.monitor!r}, which was reported {when}, and does nothing without it. "
            f"Reported were {', '.join(map(repr, logs)) or 'no values'}; choose one of them: monitor=...",
        )


def _more_is_better(callback: Monitored) -> bool:
    if callback.mode != "auto":
        return callback.mode == "max"
    name = callback.monitor.removeprefix("val_")
    if name == "loss" or name.endswith("_loss"):
        return False
    for metric in _metrics(callback.model):
        if (name == metric.name or name.endswith(f"_{metric.name}")) and direction_of(metric) is not None:
            return direction_of(metric) == "up"
    raise ArgumentError(
        f"HL705: {type(callback).__name__} cannot tell whether more or less of {callback.monitor!r} is better. Say so: "
        'mode="max" or mode="min".',
    )


def _metrics(owner: Any) -> Iterator[keras.Metric]:
    """All metrics, also those that a compiled model keeps together in one."""
    for metric in getattr(owner, "metrics", ()):
        if hasattr(metric, "metrics"):
            yield from _metrics(metric)
        yield metric
