"""What steps return, checked, and added on the device to the totals that are reported: part of the compiled step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import optree

from handloom._data.sample_weight import WEIGHTS
from handloom._keras import Tensor, keras
from handloom._reporting.logs import READ_AFTER, Logs, Report, Totals
from handloom._reporting.loss_tracker import LossTracker
from handloom._trace.function import Function, Version, run_eagerly
from handloom._trace.loss_weight import Weight
from handloom._trace.observe import (
    Divisors,
    Metrics,
    OwnVariable,
    divisors,
    losses_in_step,
    masks_marked,
    metrics_used,
)
from handloom._util.warnings import warn
from handloom.backends import backend
from handloom.errors import StepError
from handloom.optimizers._accumulation import GradientAccumulation, windows

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
        reductions: How an epoch's value comes of those of the steps, by name, in words; of the steps taken so far.
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
        self._unpacks, self._reset_metrics = unpacks, reset_metrics
        self._totals: dict[Any, Totals] = {}
        self._renewed: dict[int, keras.Metric] = {}
        self._known: dict[Any, tuple[Run, Report]] = {}
        self._last: list[Report | None] = [None]
        self._windows: dict[int, GradientAccumulation] = {}
        self._said_unused: set[str] = set()
        self._in_one: set[int] = set()
        self.reductions: dict[str, str] = {}
        self._flush = Function(_flush, jit_compile=jit_compile)

        check_call = _call_check(step)

        @functools.wraps(step)
        def reporting(*batch: Any) -> Report:
            check_call(*batch)
            parts, weight = weighed(*batch)
            # Op by op, a metric's first update of an epoch is the moment to reset it; a compiled step tells before.
            renew = None if backend.nested else self._renew
            with (
                metrics_used(renew) as metrics,
                divisors() as divided,
                windows() as open_windows,
                losses_in_step() as losses,
                masks_marked(backend.marked),
            ):
                returned = step(*parts)
            self._windows.update(open_windows)
            results = _Results(self.function.__name__, returned, metrics, divided, _examples(batch), weight)
            return results.added_to(self._totals, unused=tuple(losses.unused()))

        self.function = Function(reporting, jit_compile=jit_compile)
        self.logs = Logs()
        self.take = self._taking_known_steps()

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
        with run_eagerly(False):
            self._resolve(batch)

    @property
    def renewed(self) -> list[keras.Metric]:
        """The metrics that were reset when a step of this epoch first used them."""
        return list(self._renewed.values())

    def continue_epoch(self, state: Mapping[str, Any], metrics: Iterable[keras.Metric]) -> None:
        """Goes on within an epoch that an earlier process began.

        Args:
            state: From `logs.state()`.
            metrics: Those that were reset in this epoch already.
        """
        self._renewed.update((id(metric), metric) for metric in metrics)
        self.logs.restore(state, self._totals_for)

    def _totals_for(self, state: Mapping[str, Any]) -> Totals:
        averaged = None if state["averaged"] is None else np.array(state["averaged"])
        values = state["values"]
        found = _totals(
            self._totals, tuple(state["names"]), averaged, state["weighted"], str(values.dtype), tuple(values.shape)
        )
        found.variable.assign(values)
        return found

    def end_epoch(self) -> None:
        """Updates from gradients that are gathered and wait for more: none come in this epoch."""
        for optimizer in self._windows.values():
            waiting = int(backend.to_numpy(optimizer.gathered.value))
            if waiting:
                _log.info("%s: last update of the epoch, from %d of %d steps", optimizer.name, waiting, optimizer.steps)
                self._flush(optimizer, optimizer.reached)

    @contextlib.contextmanager
    def metrics_kept(self) -> Iterator[None]:
        """Within, another step may start its own epoch with the same metrics; after, they are as they were."""
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

        def take(batch: Any) -> None:
            leaves = batch if type(batch) is tuple else (batch,)
            try:
                run, report = known[(leaves is batch, *[(leaf.shape, leaf.dtype) for leaf in leaves])]
            except (KeyError, AttributeError):
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
        begun, known = time.perf_counter(), len(self._in_one)
        resolved = [self._resolve(batch) for batch in batches]
        version, alike = resolved[0][0], len({id(version) for version, _ in resolved}) == 1
        run = version.repeated(len(batches)) if alike else None
        if run is None:
            for batch in batches:
                self.take(batch)
            return
        report = self._about_to_run(version)
        run([tensors for _, tensors in resolved])
        self._in_one.add(id(run))
        self.logs.steps.extend([report] * len(batches))
        if len(self.logs.steps) >= READ_AFTER:
            self.logs.read()
        if len(self._in_one) != known:
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
            report = version.rebuild(version.run(tensors))
            self._note(report, report.unused)
            self.logs.steps.append(report)
            return
        report = self._about_to_run(version)
        version.run(tensors)
        self.logs.steps.append(report)
        leaves = batch if type(batch) is tuple else (batch,)
        if len(leaves) == len(tensors) and all(map(operator.is_, leaves, tensors)):
            self._known[(leaves is batch, *[(leaf.shape, leaf.dtype) for leaf in leaves])] = (version.run, report)

    def _resolve(self, batch: Any) -> tuple[Version, Sequence[Tensor]]:
        return self.function.resolve(batch if self._unpacks and type(batch) is tuple else (batch,))

    def _about_to_run(self, version: Version) -> Report:
        """What a compiled version reports; the metrics that it updates begin the epoch, if they have not."""
        report: Report = version.static[0]
        self._last[0] = report
        self._note(report, [*version.unused, *report.unused])
        for metric in report.metrics:
            self._renew(metric)
        return report

    def _note(self, report: Report, unused: Iterable[str]) -> None:
        """Keeps how values are reduced; warns, once each, of what the step was given and did not use."""
        self.reductions.update(report.reductions)
        for name in unused:
            if name not in self._said_unused:
                self._said_unused.add(name)
                cure = next(cure for start, cure in _HINTS.items() if name.startswith(start))
                warn(f"{self.function.__name__} does not use {name}: {cure}")

    def _renew(self, metric: keras.Metric) -> None:
        if self._reset_metrics is None and id(metric) not in self._renewed:
            self._renewed[id(metric)] = metric
            metric.reset_state()


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
                f"{getattr(step, '__name__', 'step')}{signature} cannot be called with a batch of {len(batch)} "
                f"part(s): {error}. A batch that is a tuple is passed as that many arguments, unless the step takes a "
                "single one."
            ) from error

    return check


class _Results:
    """A step's returned dict, checked and sorted: what each value is, and under which name."""

    def __init__(
        self, step: str, returned: Any, metrics: Metrics, divided: Divisors, examples: int, weight: Tensor | None
    ) -> None:
        if not isinstance(returned, Mapping):
            raise StepError(
                f"{step} must return what is to be reported as a dict of scalars, such as {{'loss': loss}}; it "
                f"returned {_shown(returned)} (of type {type(returned).__name__})."
            )
        self._step, self._metrics, self._divided = step, metrics, divided
        self._examples, self._weight = examples, weight
        self._names: dict[str, None] = {}
        self._scalars: dict[str, Tensor] = {}
        self._averaged: set[str] = set()
        self._arrays: dict[str, Tensor] = {}
        self._ratios: dict[str, tuple[Tensor, Tensor]] = {}
        self._sources: dict[str, keras.Metric] = {}
        self._reductions: dict[str, str] = {}
        for name, value in returned.items():
            self._add(str(name), value)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, keras.Metric):
            metric, value = value, value.result()
            self._metrics.note_result(value, metric)
        if isinstance(value, Mapping):
            for inner, inner_value in value.items():  # Keras's way: a metric of several results has their names.
                self._add(str(inner), inner_value)
            return
        if self._is_unused_tracker(value):
            losses = self._divided.losses
            if len(losses) != 1:
                return  # Of several losses none is the one; and 0 would be wrong.
            value = losses[0]
        self._forget(name)  # Of one name in two inner dicts, the last value counts: Keras's way.
        self._names[name] = None
        if isinstance(value, tuple) and len(value) == 2:
            self._ratios[name] = self._scalar(name, value[0]), self._scalar(name, value[1])
            self._reductions[name] = "sum over sum of weights"
            return
        metric = None if self._is_loss(value) else self._metrics.source(value)
        returned, value = value, self._tensor(name, value)
        if metric is not None:
            self._sources[name], self._reductions[name] = metric, f"result of {type(metric).__name__}"
            (self._arrays if len(value.shape) else self._scalars)[name] = value
            return
        self._reductions[name] = f"mean over {'examples' if self._weight is None else 'sample weights'}"
        divisor = self._divided.of(returned)
        # By the examples, or by the weights given, as everything. But a loss that Keras computed from weights was not
        # always divided by them.
        if divisor is not None and self._weight is not None:
            by_weights = divisor.by == "weights"
            self._ratios[name] = _times(self._scalar(name, value), divisor.value if by_weights else self._examples)
            self._reductions[name] = f"mean over {'sample weights' if by_weights else 'examples'}"
            return
        self._scalars[name] = self._scalar(name, value)
        self._averaged.add(name)

    def _is_unused_tracker(self, value: Any) -> bool:
        """Whether a value is the result of the model's loss tracker, in which the step has not kept its loss."""
        metric = self._metrics.source(value)
        return isinstance(metric, LossTracker) and metric not in self._metrics.updated and not self._is_loss(value)

    def _is_loss(self, value: Any) -> bool:
        """Whether a value is a loss of the step itself, though a metric hands it out."""
        return any(value is loss for loss in self._divided.losses)

    def _forget(self, name: str) -> None:
        for kind in (self._scalars, self._arrays, self._ratios, self._sources):
            kind.pop(name, None)
        self._averaged.discard(name)

    def _scalar(self, name: str, value: Any) -> Tensor:
        value = self._tensor(name, value)
        if len(value.shape):
            raise StepError(
                f"{self._step} returned a tensor of shape {tuple(value.shape)} as {name!r}; what is reported must be "
                "scalars. Reduce it, for example with keras.ops.mean, or report a keras.Metric."
            )
        return value

    def _tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, (keras.Variable, bool, int, float)) or backend.is_array(value):
            return ops.convert_to_tensor(value)
        raise StepError(
            f"{self._step} returned {_shown(value)} (of type {type(value).__name__}) as {name!r}; what is "
            "reported must be scalars (tensors or numbers), pairs (sum, weight) of these, or keras.Metric objects."
        )

    def added_to(self, known: dict[Any, Totals], unused: tuple[str, ...]) -> Report:
        """Adds the results to totals, which are made at the first time."""
        packs: dict[str, list[str]] = {}
        for name, scalar in self._scalars.items():
            packs.setdefault(_pack_dtype(scalar, name in self._averaged), []).append(name)
        totals = [self._add_pack(known, dtype, tuple(names)) for dtype, names in packs.items()]
        totals += [self._add_ratio(known, name, *pair) for name, pair in self._ratios.items()]
        totals += [self._keep_array(known, name, array) for name, array in self._arrays.items()]
        return Report(
            tuple(self._names),
            tuple(totals),
            self._examples,
            self._metrics.updated,
            self._sources,
            self._reductions,
            unused,
        )

    def _add_pack(self, known: dict[Any, Totals], dtype: str, names: tuple[str, ...]) -> Totals:
        averaged = np.array([name in self._averaged for name in names])
        weighted = self._weight is not None and bool(averaged.any())
        totals = _totals(known, names, averaged, weighted, dtype, (len(names) + weighted,))
        values = ops.stack([ops.cast(self._scalars[name], dtype) for name in names])
        if weighted:
            weight = ops.cast(self._weight, dtype)
            # A batch whose weights sum to zero has no part in the mean, whatever its value, even NaN.
            values = ops.where(ops.logical_and(averaged, ops.equal(weight, 0)), ops.zeros_like(values), values)
            values = ops.append(values * ops.where(averaged, weight, ops.ones_like(weight)), weight)
        elif averaged.any():
            values = values * ops.convert_to_tensor(np.where(averaged, self._examples, 1), dtype)
        summed = np.append(averaged, True) if weighted else averaged
        before = totals.variable.value
        if not summed.all():
            before = ops.where(summed, before, ops.zeros_like(before))
        totals.variable.assign(before + values)
        return totals

    def _add_ratio(self, known: dict[Any, Totals], name: str, total: Tensor, weight: Tensor) -> Totals:
        totals = _totals(known, (name,), np.array([True]), True, "float32", (2,))
        values = ops.stack([ops.cast(total, "float32"), ops.cast(weight, "float32")])
        totals.variable.assign(totals.variable.value + values)
        return totals

    def _keep_array(self, known: dict[Any, Totals], name: str, array: Tensor) -> Totals:
        dtype = keras.backend.standardize_dtype(array.dtype)
        totals = _totals(known, (name,), None, False, dtype, tuple(array.shape))
        totals.variable.assign(array)
        return totals


def _totals(
    known: dict[Any, Totals],
    names: tuple[str, ...],
    averaged: np.ndarray | None,
    weighted: bool,
    dtype: str,
    shape: tuple[int, ...],
) -> Totals:
    """The totals for these names, the same for every version of a step that returns them."""
    key = (names, None if averaged is None else averaged.tobytes(), weighted, dtype, shape)
    if key not in known:
        variable = OwnVariable("zeros", shape=shape, dtype=dtype, trainable=False, autocast=False, name="totals")
        known[key] = Totals(names, averaged, weighted, variable)
    return known[key]


def _pack_dtype(scalar: Tensor, averaged: bool) -> str:
    """A dtype that holds the scalar, or its mean, exactly, and that many have in common."""
    dtype = str(keras.backend.standardize_dtype(scalar.dtype))
    if dtype == "float64" or (not averaged and "int" in dtype):
        return dtype
    return "float32"


def _times(mean: Tensor, divisor: Weight) -> tuple[Tensor, Tensor]:
    """A mean as the sum that it was, and what that was divided by."""
    divisor = ops.cast(divisor, "float32")
    mean = ops.cast(mean, "float32")
    return ops.where(ops.equal(divisor, 0), ops.zeros_like(mean), mean * divisor), divisor


def _flush(optimizer: GradientAccumulation, reached: tuple[str, ...]) -> None:
    del reached  # Static: with other variables, another version.
    optimizer.flush()


def _examples(batch: Any) -> int:
    """The number of examples in a batch: the length of its first array."""
    for leaf in optree.tree_leaves(batch):
        if backend.is_array(leaf) and len(leaf.shape):
            return int(leaf.shape[0])
    return 1


def _shown(value: Any) -> str:
    if backend.is_array(value):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
