"""Reported values on the host: the means and last values of an epoch, read from the device as late as possible.

Steps add what they return to totals, which are variables (see `totals.py`). `Logs` reads the totals when a value is
asked for, and once every `READ_AFTER` steps, into sums in double precision.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from handloom._keras import Tensor, keras
from handloom._reporting.totals import Totals
from handloom.backends import backend
from handloom.distribute._strategy import current

Value: TypeAlias = float | np.ndarray
"""A reported value: a number, or an array for a metric that returns one."""

# Totals in single precision add up no more steps than this: their rounding error stays below that of the values.
READ_AFTER = 1024


@dataclasses.dataclass(eq=False)
class Report:
    """Describes what one version of a step reports.

    Attributes:
        reductions: How batch values are reduced to the epoch's value, in words, by name. The names are in the order in
            which the step returned them.
        totals: The totals that hold the values.
        examples: Number of examples in the batch.
        metrics: The metrics that the step updates.
        sources: The metrics that returned reported values, by name.
        unused: Descriptions of added losses and regularizers that no loss of the step includes.
        suspects: The names of scalars that may be computed from a metric's running result, which has no mean.
        metric_marks: The marks of metric results in the program.
        computed_from_metrics: The suspects that are computed so; their last value is reported. Set once it is known.
    """

    reductions: dict[str, str] = dataclasses.field(default_factory=dict)
    totals: tuple[Totals, ...] = ()
    examples: int = 0
    metrics: tuple[keras.Metric, ...] = ()
    sources: Mapping[str, keras.Metric] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    suspects: frozenset[str] = frozenset()
    metric_marks: tuple[str, ...] = ()
    computed_from_metrics: frozenset[str] = frozenset()


class Logs:
    """The values that the steps of an epoch have reported so far. `BatchLogs` shows them to callbacks.

    A scalar's value is the mean over the steps, weighted by examples (or sample weights); a metric's value is its last
    result. A metric that nothing has updated in this epoch is absent. Reading does not change the values, not even in
    the last digit.

    Args:
        sorts: Whether the values are in the order of their names, as those of Keras's models; by default, in the order
            in which the step returns them.

    Attributes:
        steps: The reports of the steps whose values are still in the totals.
        seconds_compiling: How much of the epoch's time was spent compiling steps.
    """

    def __init__(self, *, sorts: bool = False) -> None:
        self._sorts = sorts
        self.steps: list[Report] = []
        self._begin()

    def _begin(self) -> None:
        self.seconds_compiling = 0.0
        self._steps_read = self._examples_read = 0
        self._sums = Sums()
        self._sources: dict[str, keras.Metric] = {}
        self._updated: dict[int, keras.Metric] = {}
        self._updated_before: set[str] = set()
        self._computed: set[str] = set()
        self._first_states: dict[int, list[Tensor]] = {}

    def clear(self) -> None:
        """Starts a new epoch."""
        self._reset_totals()
        self._begin()

    def note(self, report: Report) -> None:
        """Takes in a report, before its values are read; in a compiled step also before the step runs."""
        for name in report.reductions:
            self._sums.last.setdefault(name, math.nan)
        for metric in report.sources.values():
            if id(metric) not in self._first_states and metric not in report.metrics:
                self._first_states[id(metric)] = [keras.ops.copy(variable.value) for variable in metric.variables]
        self._sources.update(report.sources)
        self._updated.update((id(metric), metric) for metric in report.metrics)
        self._computed.update(report.computed_from_metrics)

    def add(self, report: Report, count: int = 1) -> None:
        """Counts steps whose values are in the totals; reads the totals if there are many."""
        self.steps.extend([report] * count)
        if len(self.steps) >= READ_AFTER:
            self.read()

    @property
    def examples(self) -> int:
        """Number of examples in the steps so far; known without waiting for the device."""
        return self._examples_read + sum(report.examples for report in self.steps)

    def updates(self, metric: keras.Metric) -> bool:
        """Whether a step of this epoch has updated a metric."""
        return id(metric) in self._updated

    @property
    def names(self) -> Iterable[str]:
        """The names of the values, known without waiting for the device; those of idle metrics too."""
        return self._sums.last

    def reported(self) -> dict[str, Value]:
        """The values; waits for the device."""
        return self._reader(lambda totals: totals.variable.value)()

    def reported_later(self) -> Callable[[], dict[str, Value]]:
        """Copies the values on the device; returns a function that reads the copies, at any time."""
        return self._reader(lambda totals: keras.ops.copy(totals.variable.value))

    def _reader(self, value_of: Callable[[Totals], Tensor]) -> Callable[[], dict[str, Value]]:
        waiting = [(totals, value_of(totals)) for totals in self._waiting()]
        before, computed, strategy = self._sums.copy(), frozenset(self._computed), current()
        names = [name for name in self.names if not self._is_idle(name)]

        def read() -> dict[str, Value]:
            sums = before.copy()
            with strategy.scope():
                sums.add(waiting)
            return {name: sums.value(name, last=name in computed) for name in (sorted(names) if self._sorts else names)}

        return read

    def _count(self) -> int:
        return self._steps_read + len(self.steps)

    def _is_idle(self, name: str) -> bool:
        """Whether a name is that of a metric that nothing has updated in this epoch, neither a step nor the user."""
        metric = self._sources.get(name)
        if metric is None or self.updates(metric) or name in self._updated_before:
            return False
        pairs = zip(metric.variables, self._first_states.get(id(metric), ()), strict=False)
        return all(np.array_equal(backend.to_numpy(now.value), backend.to_numpy(then)) for now, then in pairs)

    def read(self) -> None:
        """Moves the values from the totals to the host, and resets the totals to zero."""
        self._examples_read, self._steps_read = self.examples, self._count()
        self._sums.add((totals, totals.variable.value) for totals in self._waiting())
        self._reset_totals()

    def _waiting(self) -> list[Totals]:
        """The totals that hold values of steps."""
        return list(dict.fromkeys(totals for report in self.steps for totals in report.totals))

    def _reset_totals(self) -> None:
        for totals in self._waiting():
            totals.variable.assign(keras.ops.zeros_like(totals.variable.value))
        self.steps.clear()

    def state(self) -> dict[str, Any]:
        """The values so far, and those that are still in the totals, as JSON and arrays."""
        updated = {name for name, metric in self._sources.items() if id(metric) in self._updated}
        names = {"updated": sorted(updated | self._updated_before), "computed": sorted(self._computed)}
        return {
            "steps": len(self.steps),
            "steps_read": self._steps_read,
            "examples": self.examples,
            "sums": vars(self._sums.copy()) | names,
            "totals": [totals.state() for totals in self._waiting()],
        }

    def restore(self, state: Mapping[str, Any], totals_for: Callable[[Mapping[str, Any]], Totals]) -> None:
        """Restores a state.

        Args:
            state: From `state()`.
            totals_for: Returns the totals for an item of `state["totals"]`, with its values in them.
        """
        self.clear()
        self._steps_read, self._examples_read = state["steps_read"], state["examples"]
        sums = state["sums"]
        self._sums = Sums(sums["sums"], sums["weights"], sums["last"]).copy()
        self._updated_before, self._computed = set(sums["updated"]), set(sums["computed"])
        # The values still in the totals count as those of steps, so that the next read comes at the same step.
        self.steps.extend([Report(totals=tuple(map(totals_for, state["totals"])))] * state["steps"])


@dataclasses.dataclass
class Sums:
    """The values read from totals, in double precision, by name.

    Attributes:
        sums: The weighted sums of averaged values.
        weights: The sums of their weights.
        last: The last values; NaN where there is none yet. Has every name, in the order of the report.
    """

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    last: dict[str, Value] = dataclasses.field(default_factory=dict)

    def copy(self) -> "Sums":
        return Sums(dict(self.sums), dict(self.weights), dict(self.last))

    def add(self, waiting: Iterable[tuple[Totals, Tensor]]) -> None:
        """Adds the contents of totals, given as the values of their variables."""
        for totals, tensor in waiting:
            values, count = np.array(backend.to_numpy(tensor)), len(totals.means)
            summed, lasts = current().sum(values[: 2 * count]), values[2 * count :]
            for name, total, weight in zip(totals.means, summed[:count], summed[count:], strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + float(total)
                self.weights[name] = self.weights.get(name, 0.0) + float(weight)
            for name, value in zip(totals.lasts, lasts, strict=True):
                self.last[name] = value if np.ndim(value) else float(value)

    def value(self, name: str, *, last: bool) -> Value:
        """The mean of an averaged value, or its last value; the last value of any other."""
        if last or name not in self.sums:
            return self.last[name]
        return self.sums[name] / self.weights[name] if self.weights[name] else math.nan
