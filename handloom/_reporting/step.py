"""A compiled step, together with the reports of what it returns."""

import contextlib
import functools
import inspect
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import optree

from handloom._data.sample_weight import ThirdPart
from handloom._keras import Tensor, Tensors, keras
from handloom._reporting.logs import READ_AFTER, Logs, Report, Value
from handloom._reporting.metrics import EpochMetrics
from handloom._reporting.observed import StepObserver
from handloom._reporting.results import Results, mark_of
from handloom._reporting.totals import AllTotals
from handloom._trace.eager import eagerly
from handloom._trace.function import Function, Version
from handloom._trace.observe import observing
from handloom._trace.unused import unused_in, warn_of_unused
from handloom._util.findings import warn
from handloom.backends import backend
from handloom.errors import DataError, HandloomError, StepError
from handloom.optimizers._accumulation import GradientAccumulation

ops = keras.ops

_log = logging.getLogger("handloom")


class ReportingStep:
    """A compiled step, together with the reports of what it returns.

    Args:
        step: Takes a batch, or the parts of one. Returns a dict of scalars, of metrics, or of dicts of these.
        unpacks: Whether the parts of a tuple are the step's arguments.
        weighed: Returns a batch as the step takes it, with its sample weights marked, and the sum of these, a scalar
            tensor; or `None` to count its examples.
        third: Observes whether the step takes the third part of a batch for weights, if `weighed` does not tell.
        model: The model that the step is a method of, if it is one; as for `EpochMetrics`.
        jit_compile: As for `hl.function`.

    Attributes:
        function: The step as a compiled function.
        logs: The values since the start of the epoch, by name.
        metrics: The metrics that the steps of this epoch update.
        reductions: How batch values are reduced to the epoch's value, in words, by name; of the steps taken so far.
        take: Takes one step on a batch, and returns 1, the number of steps. Does not wait for the device.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        unpacks: bool,
        weighed: Callable[..., tuple[Sequence[Any], Tensor | None]],
        third: ThirdPart | None = None,
        model: keras.Model | None = None,
        jit_compile: bool | str = "auto",
    ) -> None:
        self._step, self._signature, self._unpacks = step, signature_of(step), unpacks
        self._weighed, self._third, self.metrics = weighed, third, EpochMetrics(model)
        self._totals = AllTotals()
        self._accumulating: dict[int, GradientAccumulation] = {}
        self._fused: set[int] = set()
        self._side_traces: dict[tuple[str, ...], Version | None] = {}
        self.reductions: dict[str, str] = {}
        self.logs = Logs(sorts=model is not None)
        reporting = functools.update_wrapper(functools.partial(self._report), step, updated=())
        self.function = Function(reporting, jit_compile=jit_compile)
        self._flush = Function(_flush, jit_compile=jit_compile)
        self._known: dict[Any, tuple[Callable[[Tensors], Any], Report, Version]] = {}
        self.take = self._taking_known_steps()

    def _report(self, *batch: Any) -> Report:
        """Runs the step and adds what it returns to totals. This function is compiled."""
        self._check_call(batch)
        examples = _examples(batch)
        parts, weight = self._weighed(*batch)
        # In eager execution, a metric is reset right before its first update of an epoch; see also `_about_to_run`.
        seen = StepObserver(None if backend.nested else self.metrics.about_to_update, self._accumulating)
        with observing(*seen.all, *([self._third] if self._third else ())):
            returned = backend.with_control_flow(self._step)(*parts)
        if self._third is not None:
            weight = self._third.sum_after()
        return Results(self.function.__name__, returned, seen, examples, weight).report(self._totals)

    def _check_call(self, batch: tuple[Any, ...]) -> None:
        try:
            if self._signature is not None:
                self._signature.bind(*batch)
        except TypeError as error:
            raise StepError(
                f"HL206: {self.function.__name__}{self._signature} cannot take a batch of {len(batch)} parts: {error}.",
                "The parts of a tuple are passed as separate arguments, unless the step takes only one argument.",
                "Give the step one argument for each part, or a single one for the whole batch.",
            ) from error

    # ------------------------------------------------------------------- epochs

    def start_epoch(self) -> None:
        """Resets the values and the metrics."""
        self.logs.clear()
        self.metrics.start_epoch()
        self._known.clear()

    def prepare(self, batch: Any) -> None:
        """Compiles the step for a batch and creates its variables, without taking the step."""
        with eagerly(False):
            self._resolve(batch)

    def continue_epoch(self, state: Mapping[str, Any], metrics: Iterable[keras.Metric]) -> None:
        """Resumes within an epoch that an earlier process began.

        Args:
            state: From `logs.state()`.
            metrics: The metrics that were reset in this epoch already.
        """
        self.metrics.continue_epoch(metrics)
        self.logs.restore(state, self._totals.restored)

    @contextlib.contextmanager
    def epoch_kept(self, *, from_logs: bool) -> Iterator[None]:
        """A block in which another run may use the metrics, and the step itself if `from_logs`, amid an epoch."""
        logs = self.logs.state() if from_logs else None
        with self.metrics.kept():
            yield
        if logs is not None:
            self.continue_epoch(logs, ())

    def results(self) -> dict[str, Value]:
        """The reported values, which the model's metrics show from now on too."""
        values = self.logs.reported()
        self.metrics.show(self.logs, values)
        return values

    def end_epoch(self) -> None:
        """Updates from accumulated gradients that wait for more: no more come in this epoch."""
        for optimizer in self._accumulating.values():
            waiting = int(backend.to_numpy(optimizer.gathered.value))
            if waiting:
                _log.info("%s: last update of the epoch, from %d of %d steps", optimizer.name, waiting, optimizer.steps)
                self._flush(optimizer, optimizer.reached)

    # -------------------------------------------------------------------- steps

    def _taking_known_steps(self) -> Callable[[Any], int]:
        """The fast path of the training loop, for batches like an earlier one of the epoch.

        It is one function whose names are bound once: at a few microseconds a step, attribute look-ups and calls count.
        """
        known, logs, steps, take_new, key = self._known, self.logs, self.logs.steps, self._take_new, backend.key

        def take(batch: Any) -> int:
            leaves = batch if type(batch) is tuple else (batch,)
            try:
                run, report, _ = known[(leaves is batch, *map(key, leaves))]
            except (KeyError, AttributeError, TypeError):
                run = None
            if run is None:
                take_new(batch)
                return 1
            run(leaves)
            steps.append(report)
            if len(steps) >= READ_AFTER:
                logs.read()
            return 1

        return take

    def heed_changes(self) -> None:
        """To be called after code of the user has run amid an epoch: Python values in a step may have changed."""
        if not all(version.holds() for _, _, version in self._known.values()):
            self._known.clear()

    def take_group(self, batches: Sequence[Any], size: int) -> int:
        """Takes a step on each of several batches; returns their number.

        If there are `size` batches of one signature, and the backend is able to, it takes the steps in one dispatch.
        """
        if len(batches) == size and self._take_fused(batches):
            return size
        return sum(self.take(batch) for batch in batches)

    def _take_fused(self, batches: Sequence[Any]) -> bool:
        with self._timing_compilation():
            resolved = [self._resolve(batch) for batch in batches]
            version, alike = resolved[0][0], len({id(version) for version, _ in resolved}) == 1
            run = version.fused(len(batches)) if alike else None
            if run is None:
                return False
            report = self._about_to_run(version)
            run([tensors for _, tensors in resolved])
            self._fused.add(id(run))
        self.logs.add(report, len(batches))
        return True

    def _take_new(self, batch: Any) -> None:
        """Takes a step on a batch unlike those before it in the epoch."""
        with self._timing_compilation():
            version, tensors = self._resolve(batch)
            if not version.compiled:
                self._take_eagerly(version, tensors, batch)
                return
            report = self._about_to_run(version)
            version.run(tensors)
        self.logs.add(report)
        leaves = batch if type(batch) is tuple else (batch,)
        if len(leaves) == len(tensors) and all(map(operator.is_, leaves, tensors)):
            self._known[(leaves is batch, *map(backend.key, leaves))] = version.run, report, version

    def _take_eagerly(self, version: Version, tensors: Tensors, batch: Any) -> None:
        report: Report = version.rebuild(version.run(tensors))
        if report.suspects:
            traced = self._traced_aside(tuple(report.reductions), batch)
            if traced is not None:
                self._find_computed(report, traced)
        self._note(report, report.unused)
        self.logs.add(report)

    def _about_to_run(self, version: Version) -> Report:
        """The report of a compiled version. Resets the metrics that it is the first to update in this epoch."""
        report: Report = version.static[0]
        if report.suspects:
            self._find_computed(report, version)
        self._note(report, [*unused_in(version.dependencies, self._step), *report.unused])
        for metric in report.metrics:
            self.metrics.about_to_update(metric)
        return report

    def _resolve(self, batch: Any) -> tuple[Version, Tensors]:
        return self.function.resolve(self._arguments(batch))

    def _arguments(self, batch: Any) -> tuple[Any, ...]:
        return batch if self._unpacks and type(batch) is tuple else (batch,)

    @contextlib.contextmanager
    def _timing_compilation(self) -> Iterator[None]:
        """Counts the time of a block as compilation if anything is compiled in it.

        The first run of a version is part of the block: some backends compile then.
        """
        begun, compiled = time.perf_counter(), len(self.function.traces) + len(self._fused)
        yield
        if len(self.function.traces) + len(self._fused) != compiled:
            self.logs.seconds_compiling += time.perf_counter() - begun

    # ----------------------------------------------------------------- findings

    def _note(self, report: Report, unused: Iterable[str]) -> None:
        self.logs.note(report)
        self.reductions.update(report.reductions)
        for name in unused:
            if self.function.is_news(name):
                warn_of_unused(self.function.__name__, name)

    def _find_computed(self, report: Report, version: Version) -> None:
        """Finds the values that a version computes from a metric's running result: they are not averaged."""
        marks = version.static[0].metric_marks
        computed = version.dependencies.depend_on(marks)
        mixed = computed & version.dependencies.depend_on_arguments(not_through=marks)
        names = [name for name in report.reductions if name in report.suspects and mark_of(name) in computed]
        report.computed_from_metrics = frozenset(names)
        for name in names:
            report.reductions[name] = "last value, computed from a metric's result"
            if mark_of(name) in mixed and self.function.is_news(mark_of(name)):
                warn(
                    f"HL205: {self.function.__name__} computes {name!r} from the batch and a metric's running result.",
                    "Such a value has no mean over the epoch: the last batch's value is reported.",
                    "Return the two separately.",
                )

    def _traced_aside(self, names: tuple[str, ...], batch: Any) -> Version | None:
        """A compiled version of a step that runs eagerly, traced only to see what depends on what."""
        if names not in self._side_traces:
            self._side_traces[names] = None
            with eagerly(False), contextlib.suppress(HandloomError):
                version, _ = Function(self.function.python_function).resolve(self._arguments(batch))
                self._side_traces[names] = version if version.compiled else None
        return self._side_traces[names]


def signature_of(step: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a step; `None` for a builtin without one."""
    try:
        return inspect.signature(step)
    except (TypeError, ValueError):
        return None


def _flush(optimizer: GradientAccumulation, reached: tuple[str, ...]) -> None:
    del reached  # A static argument: with other variables, another version is compiled.
    optimizer.flush()


def _examples(batch: Any) -> int:
    """The number of examples in a batch: the length of its first array.

    Raises:
        DataError: All arrays are empty.
    """
    arrays = (leaf for leaf in optree.tree_leaves(batch) if backend.is_array(leaf) and len(leaf.shape))
    lengths = [int(array.shape[0]) for array in arrays]
    if lengths and not any(lengths):
        raise DataError(
            "HL445: A batch is empty: its arrays have 0 examples.",
            "It has no mean loss; nothing can be learned from it.",
            "Leave it out where the batches are made: if len(x): yield x, y.",
        )
    return next(iter(lengths), 1)
