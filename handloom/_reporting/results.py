"""What a step returns, checked: what each value is, and how it is reduced to the value of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handloom._keras import Tensor, keras
from handloom._reporting.logs import Report
from handloom._reporting.loss_tracker import LossTracker
from handloom._reporting.observed import StepObservers
from handloom._reporting.totals import AllTotals, Entry
from handloom._trace.losses import Denominator
from handloom.backends import backend
from handloom.errors import StepError

ops = keras.ops


class Results:
    """The dict that a step returned.

    Args:
        step: The name of the step.
        returned: What it returned.
        seen: What happened in it.
        examples: Examples in the batch.
        weight: The sum of its sample weights, `None` to count its examples.

    Raises:
        StepError: If it is no dict of what can be reported.
    """

    def __init__(self, step: str, returned: Any, seen: StepObservers, examples: int, weight: Tensor | None) -> None:
        if not isinstance(returned, Mapping):
            raise StepError(
                f"HL201: {step} must return what is to be reported as a dict of scalars, such as {{'loss': loss}}; it "
                f"returned {_shown(returned)} (of type {type(returned).__name__}).",
            )
        self._step, self._examples, self._weight = step, examples, weight
        self._metrics, self._denominators, self._losses = seen.metrics, seen.denominators, seen.losses
        self._entries: dict[str, Entry] = {}
        self._computed: set[str] = set()
        for name, value in returned.items():
            self._add(str(name), value)

    def report(self, totals: AllTotals) -> Report:
        """Adds the results to totals."""
        suspects = self._computed if self._metrics.marks else set()
        entries = {name: _marked(name, entry) if name in suspects else entry for name, entry in self._entries.items()}
        return Report(
            names=tuple(entries),
            totals=totals.add(entries, self._examples, self._weight),
            examples=self._examples,
            metrics=self._metrics.updated,
            sources={name: entry.source for name, entry in entries.items() if entry.source is not None},
            reductions={name: entry.reduction for name, entry in entries.items()},
            unused=tuple(self._losses.descriptions()),
            suspects=frozenset(suspects),
            metric_marks=self._metrics.marks,
        )

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, keras.Metric):
            value = self._metrics.metric_result(value, value.result())
        if isinstance(value, Mapping):
            for inner, inner_value in value.items():  # Keras's way: a metric of several results has their names.
                self._add(str(inner), inner_value)
        elif not self._is_unused_tracker(value):
            self._entries[name] = self._entry(name, value)
        elif len(self._denominators.losses) == 1:  # Of several losses none is the one; and 0 would be wrong.
            self._entries[name] = self._entry(name, self._denominators.losses[0])

    def _entry(self, name: str, value: Any) -> Entry:
        self._computed.discard(name)  # Of one name in two inner dicts, the last value counts: Keras's way.
        if isinstance(value, tuple) and len(value) == 2:
            total, weight = (self._scalar(name, part) for part in value)
            return Entry("sum over sum of weights", total, weight)
        metric = self._metrics.source(value)
        if metric is not None:
            return Entry(f"result of {type(metric).__name__}", last=self._tensor(name, value), source=metric)
        denominator = self._denominators.of(value)
        if denominator is None and not self._denominators.is_loss(value) and not self._metrics.is_differentiated(value):
            self._computed.add(name)
        return self._average(self._scalar(name, value), denominator)

    def _average(self, value: Tensor, denominator: Denominator | None) -> Entry:
        """By the examples, or by the weights given, as everything.

        But a loss that Keras computed from weights was not always divided by them.
        """
        if denominator is None or self._weight is None:
            by = "examples" if self._weight is None else "sample weights"
            return Entry(f"mean over {by}", value, counts=True)
        by_weights = denominator.by == "weights"
        total, weight = _times(value, denominator.value if by_weights else self._examples)
        return Entry(f"mean over {'sample weights' if by_weights else 'examples'}", total, weight)

    def _is_unused_tracker(self, value: Any) -> bool:
        """Whether a value is the result of the model's loss tracker, in which the step has not kept its loss."""
        metric = self._metrics.source(value)
        return isinstance(metric, LossTracker) and metric not in self._metrics.updated

    def _scalar(self, name: str, value: Any) -> Tensor:
        value = self._tensor(name, value)
        if len(value.shape):
            raise StepError(
                f"HL202: {self._step} returned a tensor of shape {tuple(value.shape)} as {name!r}; what is reported must be "
                "scalars. Reduce it, for example with keras.ops.mean, or report a keras.Metric.",
            )
        return value

    def _tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, (keras.Variable, bool, int, float)) or backend.is_array(value):
            return ops.convert_to_tensor(value)
        raise StepError(
            f"HL203: {self._step} returned {_shown(value)} (of type {type(value).__name__}) as {name!r}; what is "
            "reported must be scalars (tensors or numbers), pairs (sum, weight) of these, or keras.Metric objects.",
        )


def mark_of(name: str) -> str:
    """What a reported scalar is marked as, so that it is known whether it depends on the result of a metric."""
    return f"reported: {name}"


def _marked(name: str, entry: Entry) -> Entry:
    """The same entry, marked, and with its last value too: which of both counts is known once the step is traced."""
    value = backend.marked(entry.total, mark_of(name))
    return entry._replace(total=value, last=value)


def _times(mean: Tensor, divisor: Any) -> tuple[Tensor, Tensor]:
    """A mean as the sum that it was, and what that was divided by."""
    divisor = ops.cast(divisor, "float32")
    mean = ops.cast(mean, "float32")
    return ops.where(ops.equal(divisor, 0), ops.zeros_like(mean), mean * divisor), divisor


def _shown(value: Any) -> str:
    if backend.is_array(value):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
