"""Device totals turned into host numbers, late: the means and last values that are reported.

Steps add what they return to totals, which are variables of their own (see `_reporting`), so that the loop neither
waits for results nor collects them. Here the totals are read, when somebody looks and every so many steps, into sums
in double precision.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TypeAlias

import numpy as np

from handloom._keras import keras
from handloom.backends import backend

Value: TypeAlias = float | np.ndarray
"""What is reported under one name: a number, or an array for a metric whose result is one."""

# Totals in single precision grow no longer than this: their rounding stays below that of the values.
READ_AFTER = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Totals:
    """A variable in which steps leave some of what they return.

    Attributes:
        names: The names of its entries.
        averaged: For each entry, whether it is a sum over the steps, of values times weights; else the last value.
            `None` for an array, which has a variable to itself.
        weighted: Whether a further, last entry is the sum of the weights, which then are sample weights.
        variable: Shape `(entries,)`, or that of the array.
    """

    names: tuple[str, ...]
    averaged: np.ndarray | None
    weighted: bool
    variable: keras.Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What one version of a step reports.

    Attributes:
        names: All names, in the order in which the step returned them.
        totals: Where the values are.
        examples: Number of examples in the batch, by which averages are weighted unless by sample weights.
        metrics: The metrics that the step updates.
        sources: The metrics whose results it returns, by name.
        reductions: How an epoch's value comes of those of the steps, by name, in words.
        unused: What the step was given and did not use, in words.
    """

    names: tuple[str, ...]
    totals: tuple[Totals, ...]
    examples: int
    metrics: tuple[keras.Metric, ...]
    sources: Mapping[str, keras.Metric] = dataclasses.field(default_factory=dict)
    reductions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()


class Logs(MutableMapping[str, Value]):
    """What the steps of an epoch reported so far, as one value each: a dict that reads itself when it is looked at.

    A scalar's value is the mean over the steps, weighted by examples (or sample weights); a metric's is its last
    result, and a metric that no step has updated is not in it. What a callback writes here the callbacks after it see,
    until the next step.

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
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last: dict[str, Value] = {}
        self._sources: dict[str, keras.Metric] = {}
        self._updated: dict[int, keras.Metric] = {}
        self._not_updated: set[str] = set()

    def clear(self) -> None:
        """Forgets everything."""
        self.read()
        self.seconds_compiling, self._steps_read, self._examples_read = 0.0, 0, 0
        for values in (self._sums, self._weights, self._last, self._added):
            values.clear()
        for noted in (self._sources, self._updated, self._not_updated):
            noted.clear()

    @property
    def examples(self) -> int:
        """Number of examples in the steps so far; known without waiting for them."""
        return self._examples_read + sum(report.examples for report in self.steps)

    def reported(self) -> dict[str, Value]:
        """The values as a dict, without what callbacks added."""
        self._added.clear()
        return dict(self)

    def __getitem__(self, name: str) -> Value:
        self.read()
        if name in self._now_added():
            return self._added[name]
        if name in self._not_updated:
            raise KeyError(name)
        if name not in self._sums:
            return self._last[name]
        weight = self._weights[name]
        return self._sums[name] / weight if weight else math.nan

    def __iter__(self) -> Iterator[str]:
        self.read()
        return iter(self._shown())

    def __len__(self) -> int:
        self.read()
        return len(self._shown())

    def _shown(self) -> dict[str, None]:
        return dict.fromkeys([*(name for name in self._last if name not in self._not_updated), *self._now_added()])

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

    def read(self) -> None:
        """Moves what stands in the totals here, and sets them back to zero."""
        self._examples_read, self._steps_read = self.examples, self._steps_so_far()
        steps = collections.Counter(self.steps)
        self.steps.clear()
        examples: collections.Counter[Totals] = collections.Counter()
        for report, count in steps.items():
            for name in report.names:
                self._last.setdefault(name, math.nan)
            for totals in report.totals:
                examples[totals] += count * report.examples
            self._sources.update(report.sources)
            self._updated.update((id(metric), metric) for metric in report.metrics)
        for totals, count in examples.items():
            self._take(totals, count)
        if steps:
            idle = {name: metric for name, metric in self._sources.items() if id(metric) not in self._updated}
            self._not_updated = {name for name, metric in idle.items() if _is_as_reset(metric)}

    def _take(self, totals: Totals, examples: int) -> None:
        values = np.array(backend.to_numpy(totals.variable.value))
        totals.variable.assign(np.zeros_like(values))
        if totals.averaged is None:
            self._last[totals.names[0]] = values
            return
        weight = float(values[-1]) if totals.weighted else float(examples)
        for name, averaged, value in zip(totals.names, totals.averaged, values, strict=False):
            self._last[name] = float(value)
            if averaged:
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._weights[name] = self._weights.get(name, 0.0) + weight


def _is_as_reset(metric: keras.Metric) -> bool:
    """Whether a metric has the state of one that was never updated. Its user may update it outside of steps."""
    before = [np.array(backend.to_numpy(variable.value)) for variable in metric.variables]
    metric.reset_state()
    as_reset = [backend.to_numpy(variable.value) for variable in metric.variables]
    if all(map(np.array_equal, before, as_reset)):
        return True
    for variable, value in zip(metric.variables, before, strict=True):
        variable.assign(value)
    return False
