"""A step, compiled, together with the report of what it returns."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import optree

from handloom._data.sample_weight import WEIGHTS
from handloom._keras import Tensor, keras
from handloom._reporting.logs import READ_AFTER, Logs, Report
from handloom._reporting.observed import StepObservers
from handloom._reporting.results import Results, mark_of
from handloom._reporting.totals import AllTotals
from handloom._trace.eager import eagerly
from handloom._trace.function import Function, Version
from handloom._trace.observe import observing
from handloom._util.findings import warn
from handloom.backends import backend
from handloom.errors import HandloomError, StepError
from handloom.optimizers._accumulation import GradientAccumulation

ops = keras.ops

_log = logging.getLogger("handloom")

Run: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class ReportingStep:
    """A step, compiled, together with the report of what it returns.

    Args:
        step: Takes a batch, or the parts of one. Returns a dict of scalars, of metrics, or of dicts of these.
        unpacks: Whether the parts of a tuple are the step's arguments.
        weighed: Gives a batch as the step is to have it, its sample weights marked, and their sum, a scalar tensor, or
            `None` to count its examples.
        reset_metrics: Resets the metrics at the start of an epoch. By default the metrics that the step updates are
            reset.
        jit_compile: As for `hl.function`.

    Attributes:
        function: The step as a compiled function.
        logs: The values since the start of the epoch, by name.
        reductions: How batch values are reduced to the epoch's value, by name, in words; of the steps taken so far.
        take: Takes one step on a batch; returns before it is computed, where the backend does.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        unpacks: bool,
        weighed: Callable[..., tuple[Sequence[Any], Tensor | None]],
        reset_metrics: Callable[[], None] | None = None,
        jit_compile: bool | str = "auto",
    ) -> None:
        self._step, self._weighed, self._check_call = step, weighed, _call_check(step)
        self._unpacks, self._reset_metrics = unpacks, reset_metrics
        self._totals = AllTotals()
        self._accumulating: dict[int, GradientAccumulation] = {}
        self._warned_of: set[str] = set()
        self._fused: set[int] = set()
        self._side_traces: dict[tuple[str, ...], Version | None] = {}
        self.reductions: dict[str, str] = {}
        self.logs = Logs()
        reporting = functools.update_wrapper(functools.partial(self._report), step, updated=())
        self.function = Function(reporting, jit_compile=jit_compile)
        self._flush = Function(_flush, jit_compile=jit_compile)
        # What the path of known steps looks at: cleared at the start of an epoch, never replaced.
        self._known: dict[Any, tuple[Run, Report]] = {}
        self._last: list[Report | None] = [None]
        self._renewed: dict[int, keras.Metric] = {}
        self.take = self._taking_known_steps()

    def _report(self, *batch: Any) -> Report:
        """Runs the step and adds what it returns to totals: what is compiled."""
        self._check_call(*batch)
        parts, weight = self._weighed(*batch)
        # Eagerly, a metric's first update of an epoch is the moment to reset it; a compiled step tells before.
        seen = StepObservers(None if backend.nested else self._renew, self._accumulating)
        with observing(*seen.all):
            returned = backend.with_control_flow(self._step)(*parts)
        return Results(self.function.__name__, returned, seen, _examples(batch), weight).report(self._totals)

    def start_epoch(self) -> None:
        """The values and the metrics start anew."""
        self.logs.clear()
        self._renewed.clear()
        self._known.clear()
        self._last[0] = None
        if self._reset_metrics is not None:
            self._reset_metrics()

    def prepare(self, batch: Any) -> None:
        """Compiles the step for a batch, and makes its variables, without taking it."""
        with eagerly(False):
            self._resolve(batch)

    @property
    def renewed(self) -> list[keras.Metric]:
        """The metrics that were reset when a step of this epoch first used them."""
        return list(self._renewed.values())

    def continue_epoch(self, state: Mapping[str, Any], metrics: Iterable[keras.Metric]) -> None:
        """Resumes within an epoch that an earlier process began.

        Args:
            state: From `logs.state()`.
            metrics: Those that were reset in this epoch already.
        """
        self._renewed.update((id(metric), metric) for metric in metrics)
        self.logs.restore(state, self._totals.restored)

    def end_epoch(self) -> None:
        """Updates from accumulated gradients that wait for more: none come in this epoch."""
        for optimizer in self._accumulating.values():
            waiting = int(backend.to_numpy(optimizer.gathered.value))
            if waiting:
                _log.info("%s: last update of the epoch, from %d of %d steps", optimizer.name, waiting, optimizer.steps)
                self._flush(optimizer, optimizer.reached)

    @contextlib.contextmanager
    def metrics_kept(self) -> Iterator[None]:
        """Another step may start its own epoch inside, with the same metrics; after, they are as they were."""
        variables = [variable for metric in self._renewed.values() for variable in metric.variables]
        before = [ops.copy(variable.value) for variable in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)

    def _taking_known_steps(self) -> Callable[[Any], None]:
        """The path of a training loop: a batch like one before, a step whose version is known. All else goes around.

        One function, its names bound once: at a few microseconds a step, look-ups and calls count.
        """
        known, last, logs, steps, take_new = self._known, self._last, self.logs, self.logs.steps, self._take_new
        key = backend.key

        def take(batch: Any) -> None:
            leaves = batch if type(batch) is tuple else (batch,)
            try:
                run, report = known[(leaves is batch, *map(key, leaves))]
            except (KeyError, AttributeError, TypeError):
                run = None
            if run is None or report is not last[0]:
                take_new(batch)
                return
            run(leaves)
            steps.append(report)
            if len(steps) >= READ_AFTER:
                logs.read()

        return take

    def take_in_one(self, batches: Sequence[Any]) -> None:
        """Takes a step on each of several batches: in one dispatch, if they are alike and the backend can."""
        begun, known = time.perf_counter(), len(self._fused)
        resolved = [self._resolve(batch) for batch in batches]
        version, alike = resolved[0][0], len({id(version) for version, _ in resolved}) == 1
        run = version.fused(len(batches)) if alike else None
        if run is None:
            for batch in batches:
                self.take(batch)
            return
        report = self._about_to_run(version)
        run([tensors for _, tensors in resolved])
        self._fused.add(id(run))
        self.logs.steps.extend([report] * len(batches))
        if len(self.logs.steps) >= READ_AFTER:
            self.logs.read()
        if len(self._fused) != known:
            self.logs.seconds_compiling += time.perf_counter() - begun

    def _take_new(self, batch: Any) -> None:
        """Takes a step on a batch unlike the last one."""
        begun, versions = time.perf_counter(), len(self.function.traces)
        self._take_any(batch)
        if len(self.function.traces) != versions:  # Backends compile when a version is made, or when it first runs.
            self.logs.seconds_compiling += time.perf_counter() - begun

    def _take_any(self, batch: Any) -> None:
        version, tensors = self._resolve(batch)
        if not version.compiled:
            self._take_eagerly(version, tensors, batch)
            return
        report = self._about_to_run(version)
        version.run(tensors)
        self.logs.steps.append(report)
        leaves = batch if type(batch) is tuple else (batch,)
        if len(leaves) == len(tensors) and all(map(operator.is_, leaves, tensors)):
            self._known[(leaves is batch, *map(backend.key, leaves))] = version.run, report

    def _take_eagerly(self, version: Version, tensors: Sequence[Tensor], batch: Any) -> None:
        report: Report = version.rebuild(version.run(tensors))
        if report.suspects:
            self._find_computed_eagerly(report, batch)
        self._note(report, report.unused)
        self.logs.note(report)
        self.logs.steps.append(report)

    def _resolve(self, batch: Any) -> tuple[Version, Sequence[Tensor]]:
        return self.function.resolve(self._arguments(batch))

    def _arguments(self, batch: Any) -> tuple[Any, ...]:
        return batch if self._unpacks and type(batch) is tuple else (batch,)

    def _about_to_run(self, version: Version) -> Report:
        """What a compiled version reports; the metrics that it updates begin the epoch, if they have not."""
        report: Report = version.static[0]
        self._last[0] = report
        if report.suspects:
            self._find_computed(report, version)
        self._note(report, [*version.dependencies.unused, *report.unused])
        self.logs.note(report)
        for metric in report.metrics:
            self._renew(metric)
        return report

    def _note(self, report: Report, unused: Iterable[str]) -> None:
        """Keeps how values are reduced; warns, once each, of what the step was given and did not use."""
        self.reductions.update(report.reductions)
        for name in unused:
            hint = next((hint for start, hint in _HINTS.items() if name.startswith(start)), None)
            if hint is not None and name not in self._warned_of:
                self._warned_of.add(name)
                warn(f"HL204: {self.function.__name__} does not use {name}: {hint}")

    def _find_computed(self, report: Report, version: Version) -> None:
        """Finds the values that a version computes from a metric's running result: they are not averaged."""
        marks = version.static[0].metric_marks
        computed = version.dependencies.depend_on(marks)
        mixed = computed & version.dependencies.depend_on_arguments(not_through=marks)
        report.computed_from_metrics = frozenset(name for name in report.suspects if mark_of(name) in computed)
        report.reductions = dict(report.reductions) | dict.fromkeys(report.computed_from_metrics, _COMPUTED)
        for name in report.computed_from_metrics:
            if mark_of(name) in mixed and name not in self._warned_of:
                self._warned_of.add(name)
                warn(
                    f"HL205: {self.function.__name__} computes {name!r} from this batch and from the running result of a "
                    "metric, which has no mean: the last batch's value is reported. Return the two by themselves.",
                )

    def _find_computed_eagerly(self, report: Report, batch: Any) -> None:
        """The same where nothing is compiled: the step is traced once, on the side."""
        if report.names not in self._side_traces:
            self._side_traces[report.names] = self._traced_aside(batch)
        version = self._side_traces[report.names]
        if version is not None:
            self._find_computed(report, version)

    def _traced_aside(self, batch: Any) -> Version | None:
        with eagerly(False), contextlib.suppress(HandloomError):
            version, _ = Function(self.function.python_function).resolve(self._arguments(batch))
            return version if version.compiled else None
        return None

    def _renew(self, metric: keras.Metric) -> None:
        if self._reset_metrics is None and id(metric) not in self._renewed:
            self._renewed[id(metric)] = metric
            metric.reset_state()


_COMPUTED = "last value, as it is computed from a metric's result"

# By how the name of what is not used begins.
_HINTS = {
    WEIGHTS: "every example counts alike in its losses and metrics. Pass them on, for example as compute_loss(x, y, "
    "y_pred, sample_weight), or do not give them.",
    "the mask of": "what it masks counts like the rest. A Keras loss heeds the mask of y_pred if it is given just what "
    "the layer returned; in a loss of your own multiply by it (layer.compute_mask(inputs)).",
    "the losses added by": "they are in no loss that it minimizes. Use minimize(), which includes them, or add "
    "sum(layer.losses) to the loss.",
    "the regularizer of": "an optimizer updates the variable down a loss without it. Use minimize(), which includes "
    "it, or add sum(layer.losses) to the loss.",
}


def _call_check(step: Callable[..., Any]) -> Callable[..., None]:
    """Checks that a step takes the arguments it is about to be called with."""
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # A builtin, perhaps: it will say so itself.
        return lambda *_: None

    def check(*batch: Any) -> None:
        try:
            signature.bind(*batch)
        except TypeError as error:
            raise StepError(
                f"HL206: {getattr(step, '__name__', 'step')}{signature} cannot be called with a batch of {len(batch)} "
                f"part(s): {error}. A batch that is a tuple is passed as that many arguments, unless the step takes a "
                "single one.",
            ) from error

    return check


def _flush(optimizer: GradientAccumulation, reached: tuple[str, ...]) -> None:
    del reached  # Static: with other variables, another version.
    optimizer.flush()


def _examples(batch: Any) -> int:
    """The number of examples in a batch: the length of its first array."""
    for leaf in optree.tree_leaves(batch):
        if backend.is_array(leaf) and len(leaf.shape):
            return int(leaf.shape[0])
    return 1
