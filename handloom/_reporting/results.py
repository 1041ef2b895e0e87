"""The results of a step: checked, and described by how each value is reduced to the epoch's value."""

from collections.abc import Mapping
from typing import Any

from handloom._keras import Tensor, keras
from handloom._reporting.logs import Report
from handloom._reporting.loss_tracker import LossTracker
from handloom._reporting.observed import StepObserver
from handloom._reporting.totals import AllTotals, Entry
from handloom._trace.losses import Denominator
from handloom._trace.observe import is_of_metric
from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import StepError

ops = keras.ops


class Results:
    """The dict that a step returned.

    Args:
        step: The name of the step.
        returned: The value that it returned.
        seen: The observer of its run.
        examples: Number of examples in the batch.
        weight: The sum of its sample weights; `None` to count its examples.

    Raises:
        StepError: The step returned no dict, or a value that cannot be reported.
    """

    def __init__(self, step: str, returned: Any, seen: StepObserver, examples: int, weight: Tensor | None) -> None:
        if not isinstance(returned, Mapping):
            raise StepError(
                f"HL201: {step} must return a dict of scalars, such as {{'loss': loss}}; it returned "
                f"{short(returned)} (of type {type(returned).__name__}).",
            )
        self._step, self._seen, self._examples, self._weight = step, seen, examples, weight
        self._entries: dict[str, Entry] = {}
        self._computed: set[str] = set()
        for name, value in returned.items():
            self._add(str(name), value)

    def report(self, totals: AllTotals) -> Report:
        """Adds the results to totals."""
        suspects = self._computed if self._seen.marks else set()
        entries = {name: _marked(name, entry) if name in suspects else entry for name, entry in self._entries.items()}
        return Report(
            reductions={name: entry.reduction for name, entry in entries.items()},
            totals=totals.add(entries, self._examples, self._weight),
            examples=self._examples,
            metrics=tuple(self._seen.updated.values()),
            sources={name: entry.source for name, entry in entries.items() if entry.source is not None},
            unused=tuple(self._seen.losses.descriptions()),
            suspects=frozenset(suspects),
            metric_marks=tuple(self._seen.marks),
        )

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, keras.Metric):
            value = self._seen.metric_result(value, value.result())
        if isinstance(value, keras.Variable) and is_of_metric(value):
            value = self._seen.metric_state_read(value, value.value)
        if isinstance(value, Mapping):
            for inner, inner_value in value.items():  # As in Keras, a metric with several results reports their names.
                self._add(str(inner), inner_value)
        elif not self._is_unused_tracker(value):
            self._entries[name] = self._entry(name, value)
        elif len(self._seen.denominators.losses) == 1:  # Of several losses, none is the loss; and 0 would be wrong.
            self._entries[name] = self._entry(name, self._seen.denominators.losses[0])

    def _entry(self, name: str, value: Any) -> Entry:
        self._computed.discard(name)  # If two inner dicts have the same name, the last value counts, as in Keras.
        if isinstance(value, tuple) and len(value) == 2:
            total, weight = (self._scalar(name, part) for part in value)
            self._computed.add(name)
            return Entry("sum over sum of weights", total, weight)
        metric = self._seen.source(value)
        if metric is not None:
            return Entry(f"result of {type(metric).__name__}", last=self._tensor(name, value), source=metric)
        denominator = self._seen.denominators.of(value)
        if denominator is None and not self._seen.is_loss(value):
            self._computed.add(name)
        return self._average(self._scalar(name, value), denominator)

    def _average(self, value: Tensor, denominator: Denominator | None) -> Entry:
        """Averages by examples or sample weights; but a loss of Keras was not always divided by the given weights."""
        if denominator is None or self._weight is None:
            by = "examples" if self._weight is None else "sample weights"
            return Entry(f"mean over {by}", value, counts=True)
        if denominator.by == "weights":
            return Entry("mean over sample weights", *_sum_and_weight(value, denominator.value))
        return Entry("mean over examples", *_sum_and_weight(value, self._examples))

    def _is_unused_tracker(self, value: Any) -> bool:
        """Whether a value is the result of the model's loss tracker and the step has not updated the tracker."""
        metric = self._seen.source(value)
        return isinstance(metric, LossTracker) and id(metric) not in self._seen.updated

    def _scalar(self, name: str, value: Any) -> Tensor:
        value = self._tensor(name, value)
        if len(value.shape):
            raise StepError(
                f"HL202: {self._step} returned a tensor of shape {tuple(value.shape)} as {name!r}, not a scalar.",
                fix="Reduce it, for example with keras.ops.mean, or report a keras.Metric.",
            )
        return value

    def _tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, (keras.Variable, bool, int, float)) or backend.is_array(value):
            return ops.convert_to_tensor(value)
        raise StepError(
            f"HL203: {self._step} returned {short(value)} (of type {type(value).__name__}) as {name!r}.",
            fix="Return scalars (tensors or numbers), pairs (sum, weight) of scalars, or keras.Metric objects.",
        )


def mark_of(name: str) -> str:
    """The mark of a reported scalar, by which it is known whether it depends on the result of a metric."""
    return f"reported: {name}"


def _marked(name: str, entry: Entry) -> Entry:
    """The entry, marked, with its last value too: which of the two counts is known once the step is traced."""
    total = backend.marked(entry.total, mark_of(name))
    if isinstance(entry.weight, float):
        return entry._replace(total=total, last=total)
    weight = backend.marked(entry.weight, mark_of(name))
    return entry._replace(total=total, weight=weight, last=ops.divide(total, weight))


def _sum_and_weight(mean: Tensor, divisor: Any) -> tuple[Tensor, Tensor]:
    """The sum behind a mean, and its divisor."""
    mean, divisor = ops.cast(mean, "float32"), ops.cast(divisor, "float32")
    return ops.where(ops.equal(divisor, 0), ops.zeros_like(mean), mean * divisor), divisor
