"""Device totals turned into host numbers, late: the means and last values that are reported.

Steps add what they return to totals, which are variables of their own (see `totals.py`). Here the totals are read, when
somebody looks and every so many steps, into sums in double precision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import numpy as np

from handloom._keras import Tensor, keras
from handloom._reporting.totals import Totals
from handloom.backends import backend
from handloom.distribute._strategy import current

Value: TypeAlias = float | np.ndarray
"""What is reported under one name: a number, or an array for a metric whose result is one."""

# Totals in single precision grow no longer than this: their rounding stays below that of the values.
READ_AFTER = 1024


@dataclasses.dataclass(eq=False)
class Report:
    """What one version of a step reports.

    Attributes:
        names: All names, in the order in which the step returned them.
        totals: Where the values are.
        examples: Number of examples in the batch.
        metrics: The metrics that the step updates.
        sources: The metrics whose results it returns, by name.
        reductions: How batch values are reduced to the epoch's value, by name, in words.
        unused: What the step was given and did not use, in words.
        suspects: The names of scalars that may be computed from a metric's running result, which has no mean.
        metric_marks: What the results of metrics are marked as in the program.
        computed_from_metrics: Of the suspects those that are; their last value counts. Set once that is known.
    """

    names: tuple[str, ...]
    totals: tuple[Totals, ...]
    examples: int
    metrics: tuple[keras.Metric, ...]
    sources: Mapping[str, keras.Metric] = dataclasses.field(default_factory=dict)
    reductions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    suspects: frozenset[str] = frozenset()
    metric_marks: tuple[str, ...] = ()
    computed_from_metrics: frozenset[str] = frozenset()


class Logs(MutableMapping[str, Value]):
    """What the steps of an epoch reported so far, as one value each: a dict that reads itself when it is looked at.

    A scalar's value is the mean over the steps, weighted by examples (or sample weights); a metric's is its last
    result, and a metric that nothing has updated in this epoch is not in it. What a callback writes here the callbacks
    after it see, until the next step. Looking at values does not change them, not in their last digit.

    Attributes:
        steps: What each step reported whose results still stand in the totals.
        seconds_compiling: How much of the epoch's time went into compiling steps.
    """

    def __init__(self) -> None:
        self.steps: list[Report] = []
        self.seconds_compiling = 0.0
        self._steps_read = 0
        self._examples_read = 0
        self._added: dict[str, Value] = {}
        self._added_at = 0
        self._read = Sums()
        self._carried: list[Totals] = []
        self._idle: dict[int, list[Tensor]] = {}
        self._seen: tuple[int, dict[str, Value]] = (-1, {})

    def clear(self) -> None:
        """Forgets everything."""
        self._set_back()
        self.seconds_compiling, self._steps_read, self._examples_read = 0.0, 0, 0
        self._read, self._seen = Sums(), (-1, {})
        self._added.clear()
        self._idle.clear()

    def note(self, report: Report) -> None:
        """Takes note of what is about to be reported, before the first step that does."""
        for metric in report.sources.values():
            if id(metric) not in self._idle and metric not in report.metrics:
                self._idle[id(metric)] = [keras.ops.copy(variable.value) for variable in metric.variables]

    @property
    def examples(self) -> int:
        """Number of examples in the steps so far; known without waiting for them."""
        return self._examples_read + sum(report.examples for report in self.steps)

    def reported(self) -> dict[str, Value]:
        """The values as a dict, without what callbacks added."""
        self._added.clear()
        return dict(self)

    def __getitem__(self, name: str) -> Value:
        added = self._now_added()
        return added[name] if name in added else self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values() | self._now_added())

    def __len__(self) -> int:
        return len(self._values() | self._now_added())

    def __setitem__(self, name: str, value: Value) -> None:
        self._now_added()[name] = value
        self._added_at = self._steps_so_far()

    def __delitem__(self, name: str) -> None:
        del self._now_added()[name]

    def __repr__(self) -> str:
        return repr(dict(self))

    def _now_added(self) -> dict[str, Value]:
        # Asked for rather than forgotten at each step, which would cost each step something.
        if self._added and self._added_at != self._steps_so_far():
            self._added.clear()
        return self._added

    def _steps_so_far(self) -> int:
        return self._steps_read + len(self.steps)

    def _values(self) -> dict[str, Value]:
        """The values now, computed once a step."""
        if self._seen[0] != self._steps_so_far():
            sums = self._read.copy()
            sums.add(self.steps, self._waiting())
            self._seen = self._steps_so_far(), sums.values(self._is_untouched)
        return self._seen[1]

    def _is_untouched(self, metric: keras.Metric) -> bool:
        """Whether a metric that no step updates has the state of before the epoch: its user may update it elsewhere."""
        before = self._idle.get(id(metric), ())
        pairs = zip(metric.variables, before, strict=False)
        return all(np.array_equal(backend.to_numpy(now.value), backend.to_numpy(then)) for now, then in pairs)

    def read(self) -> None:
        """Moves what stands in the totals here, and sets them back to zero."""
        self._examples_read, self._steps_read = self.examples, self._steps_so_far()
        self._read.add(self.steps, self._waiting())
        self._set_back()

    def _waiting(self) -> list[Totals]:
        """The totals in which steps have left something."""
        return list(dict.fromkeys([*self._carried, *(each for report in self.steps for each in report.totals)]))

    def _set_back(self) -> None:
        for totals in self._waiting():
            totals.variable.assign(keras.ops.zeros_like(totals.variable.value))
        self.steps.clear()
        self._carried.clear()

    def state(self) -> dict[str, Any]:
        """The values so far, and what still stands in the totals, as JSON and arrays."""
        sums = self._read.copy()
        sums.note(self.steps)
        return {
            "steps": len(self.steps),
            "steps_read": self._steps_read,
            "examples": self.examples,
            "sums": sums.state(),
            "totals": [totals.state() for totals in self._waiting()],
        }

    def restore(self, state: Mapping[str, Any], totals_for: Callable[[Mapping[str, Any]], Totals]) -> None:
        """Resumes from a state.

        Args:
            state: From `state()`.
            totals_for: Gives the totals that have such a state, holding its values.
        """
        self.clear()
        self._steps_read, self._examples_read = state["steps_read"], state["examples"]
        self._read.restore(state["sums"])
        self._carried.extend(map(totals_for, state["totals"]))
        # Totals are read every so many steps. Where they stand now counts steps that this process did not take.
        self.steps.extend([_TAKEN_BEFORE] * state["steps"])


class Sums:
    """What was reported, in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last: dict[str, Value] = {}
        self._sources: dict[str, keras.Metric] = {}
        self._updated: dict[int, keras.Metric] = {}
        self._updated_before: set[str] = set()
        self._computed: set[str] = set()

    def copy(self) -> Sums:
        """The same, to add to."""
        copied = Sums()
        for name, values in vars(self).items():
            getattr(copied, name).update(values)
        return copied

    def note(self, steps: Iterable[Report]) -> None:
        """Takes note of what steps report, but not of the values."""
        for report in dict.fromkeys(steps):
            for name in report.names:
                self._last.setdefault(name, math.nan)
            self._sources.update(report.sources)
            self._updated.update((id(metric), metric) for metric in report.metrics)
            self._computed.update(report.computed_from_metrics)

    def add(self, steps: Iterable[Report], waiting: Iterable[Totals]) -> None:
        """Adds what steps have left in totals."""
        self.note(steps)
        for totals in waiting:
            values, count = totals.values(), len(totals.means)
            if values.shape != (2 * count + len(totals.lasts),):
                self._last[totals.lasts[0]] = values
                continue
            summed, lasts = current().sum(values[: 2 * count]), values[2 * count :]
            for name, total, weight in zip(totals.means, summed[:count], summed[count:], strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + float(total)
                self._weights[name] = self._weights.get(name, 0.0) + float(weight)
            self._last.update((name, float(value)) for name, value in zip(totals.lasts, lasts, strict=True))

    def values(self, is_untouched: Callable[[keras.Metric], bool]) -> dict[str, Value]:
        """The value of each name that is not the result of a metric which nothing has updated."""
        idle = [name for name, metric in self._sources.items() if id(metric) not in self._updated]
        absent = {name for name in idle if name not in self._updated_before and is_untouched(self._sources[name])}
        return {name: self._value(name) for name in self._last if name not in absent}

    def state(self) -> dict[str, Any]:
        """All of it, as JSON and arrays. Of metrics that were updated, the names they are reported by."""
        updated = {name for name, metric in self._sources.items() if id(metric) in self._updated}
        return {
            "sums": dict(self._sums),
            "weights": dict(self._weights),
            "last": dict(self._last),
            "updated": sorted(updated | self._updated_before),
            "computed": sorted(self._computed),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        self._sums, self._weights, self._last = dict(state["sums"]), dict(state["weights"]), dict(state["last"])
        self._updated_before, self._computed = set(state["updated"]), set(state["computed"])

    def _value(self, name: str) -> Value:
        if name not in self._sums or name in self._computed:
            return self._last[name]
        weight = self._weights[name]
        return self._sums[name] / weight if weight else math.nan


_TAKEN_BEFORE = Report((), (), 0, ())
