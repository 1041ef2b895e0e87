"""The metrics of an epoch: each is reset once in it, before its first update."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from handloom._keras import Variable, keras
from handloom._reporting.logs import Logs
from handloom._reporting.loss_tracker import LossTracker


class EpochMetrics:
    """The metrics that the steps of an epoch update.

    Args:
        model: The model whose metrics are reset at the start of an epoch. By default, each metric is reset when a step
            of the epoch first updates it.
    """

    def __init__(self, model: keras.Model | None = None) -> None:
        self._model = model
        self._begun: dict[int, keras.Metric] = {}

    def __contains__(self, thing: object) -> bool:
        """Whether a step of this epoch has updated the metric."""
        return id(thing) in self._begun

    @property
    def variables(self) -> list[Variable]:
        """The variables of these metrics."""
        return [variable for metric in self._begun.values() for variable in metric.variables]

    def start_epoch(self) -> None:
        """Begins an epoch."""
        self._begun.clear()
        if self._model is not None:
            self._model.reset_metrics()

    def continue_epoch(self, metrics: Iterable[keras.Metric]) -> None:
        """Resumes within an epoch in which these metrics have been updated already."""
        self._begun.update((id(metric), metric) for metric in metrics)

    def about_to_update(self, metric: keras.Metric) -> None:
        """Resets a metric before its first update in the epoch."""
        if self._model is None and metric not in self:
            self._begun[id(metric)] = metric
            metric.reset_state()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A block in which another run may use the metrics; after it, they are as before."""
        begun, owned = dict(self._begun), [] if self._model is None else self._model.metrics
        restore = copied([variable for metric in [*begun.values(), *owned] for variable in metric.variables])
        try:
            yield
        finally:
            self._begun.clear()
            self._begun.update(begun)
            if self._model is not None:
                self._model.reset_metrics()  # The block may have created variables, which are not among the copies.
            restore()

    def show(self, logs: Logs, values: Mapping[str, Any]) -> None:
        """Makes the model's loss tracker return the loss among the values of logs, if no step has updated it."""
        for metric in [] if self._model is None else self._model.metrics:
            if isinstance(metric, LossTracker) and not logs.updates(metric):
                metric.reported = values.get(metric.name)


def copied(variables: Iterable[Variable]) -> Callable[[], None]:
    """Copies the values of variables; returns a function that restores them."""
    copies = [(variable, keras.ops.copy(variable.value)) for variable in variables]

    def restore() -> None:
        for variable, value in copies:
            variable.assign(value)

    return restore
