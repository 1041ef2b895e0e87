"""Observes everything in a step that decides how its results are reported."""

from collections.abc import Callable
from typing import Any

from handloom._keras import Tensor, Variable, keras
from handloom._trace.losses import Denominators, UncountedLosses
from handloom._trace.observe import Observer
from handloom._trace.unused import Marks
from handloom.backends import backend


class StepObserver(Observer):
    """Observes one run of a step.

    Args:
        on_metric_update: Called with each metric right before its first update.
        accumulating: Receives the optimizers that accumulate gradients, by id.

    Attributes:
        updated: The metrics whose `update_state` was called, by id, in the order of the first call.
        marks: The marks of the results and variables of metrics.
        denominators: The denominators of the losses.
        losses: The losses that are in no minimized loss.
        all: The observers to pass to `observing`.
    """

    def __init__(self, on_metric_update: Callable[[keras.Metric], None] | None, accumulating: dict[int, Any]) -> None:
        self._on_metric_update, self._accumulating = on_metric_update, accumulating
        self.updated: dict[int, keras.Metric] = {}
        self.marks: list[str] = []
        self.denominators, self.losses = Denominators(), UncountedLosses()
        self.all = (self, Marks(), self.denominators, self.losses)
        # By id, with the tensor: an id is unique only while its tensor lives.
        self._results: dict[int, tuple[Any, keras.Metric]] = {}
        self._differentiated: dict[int, Any] = {}

    def metric_updated(self, metric: keras.Metric) -> None:
        if self._on_metric_update is not None and id(metric) not in self.updated:
            self._on_metric_update(metric)
        self.updated[id(metric)] = metric

    def metric_state_read(self, variable: Variable, value: Tensor) -> Tensor:
        return self._marked(value)

    def metric_result(self, metric: keras.Metric, result: Any) -> Any:
        def marked(leaf: Any) -> Any:
            # The result of a metric inside a metric belongs to the inner one. A loss tracker may return a loss itself.
            if id(leaf) in self._results or self.denominators.is_loss(leaf) or not backend.is_array(leaf):
                return leaf
            leaf = self._marked(leaf)
            self._results[id(leaf)] = leaf, metric
            return leaf

        return keras.tree.map_structure(marked, result)

    def _marked(self, tensor: Tensor) -> Tensor:
        self.marks.append(f"result {len(self.marks)}")
        return backend.marked(tensor, self.marks[-1])

    def differentiated(self, value: Tensor) -> None:
        self._differentiated[id(value)] = value

    def accumulated(self, optimizer: keras.Optimizer) -> None:
        self._accumulating[id(optimizer)] = optimizer

    def source(self, tensor: Any) -> keras.Metric | None:
        """The metric that returned this tensor as its result, if one did."""
        return self._results[id(tensor)][1] if id(tensor) in self._results else None

    def is_loss(self, value: Any) -> bool:
        """Whether a value is a loss of the step: minimized, differentiated, or computed by `compute_loss`."""
        return self.denominators.is_loss(value) or id(value) in self._differentiated
