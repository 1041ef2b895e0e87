"""The metrics of an epoch: each is reset once in it, before its first update."""

from collections.abc import Callable, Iterable

from handloom._keras import Variable, keras


class EpochMetrics:
    """The metrics that the steps of an epoch update.

    Args:
        reset_all: Resets the metrics at the start of an epoch, as `Model.reset_metrics` does. By default, each metric
            is reset when a step of the epoch first updates it.
    """

    def __init__(self, reset_all: Callable[[], None] | None = None) -> None:
        self._reset_all = reset_all
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
        if self._reset_all is not None:
            self._reset_all()

    def continue_epoch(self, metrics: Iterable[keras.Metric]) -> None:
        """Resumes within an epoch in which these metrics have been updated already."""
        self._begun.update((id(metric), metric) for metric in metrics)

    def about_to_update(self, metric: keras.Metric) -> None:
        """Resets a metric before its first update in the epoch."""
        if self._reset_all is None and metric not in self:
            self._begun[id(metric)] = metric
            metric.reset_state()
