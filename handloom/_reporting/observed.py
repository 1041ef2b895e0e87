"""What happens in a step that decides how its results are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from handloom._keras import Layer, Tensor, get_keras_mask, keras, set_keras_mask
from handloom._trace.losses import Denominators, UncountedLosses
from handloom._trace.observe import Observer
from handloom.backends import backend
from handloom.optimizers._accumulation import GradientAccumulation


class Metrics(Observer):
    """The metrics that were updated, and the tensors that came out of a `result()`.

    Args:
        denominators: Knows the losses of the step, which a model's loss tracker hands out as they are.
        on_update: Called with each metric right before its first update.

    Attributes:
        marks: What the results are marked as.
    """

    def __init__(self, denominators: Denominators, on_update: Callable[[keras.Metric], None] | None = None) -> None:
        self._denominators, self._on_update = denominators, on_update
        self._updated: dict[int, keras.Metric] = {}
        # By id, with the tensor: an id is its own only as long as it lives.
        self._results: dict[int, tuple[Any, keras.Metric]] = {}
        self._differentiated: dict[int, Any] = {}
        self.marks: tuple[str, ...] = ()

    @property
    def updated(self) -> tuple[keras.Metric, ...]:
        """The metrics whose `update_state` was called, in the order of the first call."""
        return tuple(self._updated.values())

    def metric_updated(self, metric: keras.Metric) -> None:
        if self._on_update is not None and id(metric) not in self._updated:
            self._on_update(metric)
        self._updated[id(metric)] = metric

    def metric_result(self, metric: keras.Metric, result: Any) -> Any:
        def marked(leaf: Any) -> Any:
            # Of a metric in a metric, it is the inner one's.
            if id(leaf) in self._results or self._denominators.is_loss(leaf) or not backend.is_array(leaf):
                return leaf
            self.marks = (*self.marks, f"result {len(self.marks)}")
            leaf = backend.marked(leaf, self.marks[-1])
            self._results[id(leaf)] = leaf, metric
            return leaf

        return keras.tree.map_structure(marked, result)

    def differentiated(self, value: Tensor) -> None:
        self._differentiated[id(value)] = value

    def is_differentiated(self, value: Any) -> bool:
        """Whether a value is one that was differentiated: a loss."""
        return id(value) in self._differentiated

    def source(self, tensor: Any) -> keras.Metric | None:
        """The metric whose result a tensor is, if it is one."""
        return self._results[id(tensor)][1] if id(tensor) in self._results else None


class _Masks(Observer):
    """Marks the masks of what layers return that a step calls itself."""

    def layer_called(self, layer: Layer, outputs: Any) -> None:
        for output in keras.tree.flatten(outputs):
            mask = get_keras_mask(output)
            if mask is not None:
                set_keras_mask(output, backend.marked(mask, f"the mask of what {layer.name!r} returns"))


class _Accumulating(Observer):
    def __init__(self, optimizers: dict[int, GradientAccumulation]) -> None:
        self._optimizers = optimizers

    def accumulated(self, optimizer: keras.Optimizer) -> None:
        self._optimizers[id(optimizer)] = optimizer


class StepObservers:
    """All that watch one run of a step.

    Args:
        on_metric_update: As for `Metrics`.
        accumulating: Is given the optimizers that add up gradients, by id.

    Attributes:
        metrics: The metrics used.
        denominators: What losses were divided by.
        losses: The losses that nobody counted.
        all: To be given to `observing`.
    """

    def __init__(
        self,
        on_metric_update: Callable[[keras.Metric], None] | None,
        accumulating: dict[int, GradientAccumulation],
    ) -> None:
        self.denominators, self.losses = Denominators(), UncountedLosses()
        self.metrics = Metrics(self.denominators, on_metric_update)
        self.all = (self.metrics, self.denominators, self.losses, _Masks(), _Accumulating(accumulating))
