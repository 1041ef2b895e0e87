"""Sample weights: checked on the host, marked and summed in the step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optree

from handloom._data.sources import on_host
from handloom._interop.tensors import kind_of
from handloom._keras import Tensor, keras
from handloom._trace.observe import Observer
from handloom._trace.unused import marked_weights
from handloom.backends import backend
from handloom.errors import DataError


def weighed(data: Any) -> tuple[tuple[Any], Tensor | None]:
    """A batch for a model's step, with sample weights marked if it is `(x, y, sample_weight)`; and their sum."""
    if type(data) is not tuple or len(data) != 3:
        return (data,), None
    x, y, sample_weight = data
    is_one = backend.is_array(sample_weight)
    if not (_is_weight(sample_weight, y) if is_one else _is_like(sample_weight, y)):
        return (data,), None
    return ((x, y, marked_weights(sample_weight)),), _sum(sample_weight) if is_one else None


class ThirdPart(Observer):
    """Whether the third part of the batches of a model's step is sample weights. A shape does not tell.

    If it is not known before, it shows while the step runs, or is traced: the step, or a default step that it calls,
    unpacks the batch by `keras.utils.unpack_x_y_sample_weight`, or other inputs with the same weights.

    Args:
        is_weights: Whether it is, as far as that is known; `None` if the first run of the step tells.

    Attributes:
        is_known: Whether it was known from the beginning.
        is_weights: Whether it is, as far as that is known by now.
    """

    def __init__(self, is_weights: bool | None) -> None:
        self.is_known, self.is_weights = is_weights is not None, is_weights
        self._waiting: list[Callable[[bool], None]] = []
        self._batch: Any = None
        self._sum: Callable[[], Tensor | None] | None = None
        self._place: Any = None

    def checked(self, check: Callable[[Any, bool], None], batch: Any) -> None:
        """Calls `check(batch, is_weights)`, as soon as it is known what the third part is."""
        if self.is_weights is not None or type(batch) is not tuple or len(batch) != 3:
            check(batch, bool(self.is_weights))
        else:
            self._waiting.append(functools.partial(check, batch))

    def weighed(self, data: Any) -> tuple[tuple[Any], Tensor | None]:
        """A batch as the step takes it; and the sum of its weights, if these are known."""
        if self.is_known:
            return weighed(data) if self.is_weights else ((data,), None)
        self._batch, self._sum, self._place = data, None, backend.place
        return (data,), None

    def unpacked(self, data: Any, parts: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        batch, weights = self._batch, parts[2]
        # A part of the batch may have weights of its own; they are not those of the whole.
        if type(batch) is not tuple or len(batch) != 3 or weights is None or any(data is part for part in batch):
            return parts
        [parts], total = weighed(parts)
        if weights is batch[2]:
            self._found(True)
            self._sum = functools.partial(_sum, weights) if total is not None else None
        elif self._place == backend.place:
            self._sum = lambda: total
        return parts

    def sum_after(self) -> Tensor | None:
        """The sum of the weights that the step has turned out to take, after its run."""
        if self.is_weights is None:
            self._found(False)
        total = self._sum() if self._sum else None
        self._batch = self._sum = None
        return total

    def _found(self, is_weights: bool) -> None:
        self.is_weights = is_weights
        waiting, self._waiting = self._waiting, []
        for check in waiting:
            check(is_weights)


def weighed_at(batch: Sequence[Any], position: int | None) -> tuple[Sequence[Any], Tensor | None]:
    """The parts of a batch, with the sample weights at a position marked; and their sum."""
    if position is None or position >= len(batch) or batch[position] is None:
        return batch, None
    weights = batch[position]
    return [*batch[:position], marked_weights(weights), *batch[position + 1 :]], _sum(weights)


def _is_weight(sample_weight: Tensor, y: Any) -> bool:
    """Whether the third part of a batch is weights. In a batch of triplets, for example, it is not."""
    shape = tuple(sample_weight.shape)
    per_example = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    per_step = len(shape) == 2 and hasattr(y, "shape") and tuple(y.shape)[:2] == shape
    return per_example or per_step


def _is_like(sample_weight: Any, y: Any) -> bool:
    """Whether there are weights for each of several outputs."""
    return sample_weight is not None and optree.tree_structure(sample_weight) == optree.tree_structure(y)


def _sum(sample_weight: Any) -> Tensor:
    return keras.ops.sum(keras.ops.cast(sample_weight, keras.config.floatx()))


def check_weights(weights: Sequence[np.ndarray], *, training: bool) -> None:
    """Checks the sample weights of a batch, or of all data.

    Args:
        weights: From `weights_in`.
        training: Whether they are the weights of one batch to train on.

    Raises:
        DataError: A weight is negative or not finite; in training also if all are zero.
    """
    for array in weights:
        wrong = ~(np.isfinite(array) & (array >= 0))
        if wrong.any():
            first = tuple(map(int, np.argwhere(wrong)[0]))
            raise DataError(
                f"HL410: sample_weight has {int(wrong.sum())} value(s) that are negative or not finite; the first is "
                f"{array[first]} at {list(first)}.",
                "A weight, 0 or more, says how much an example counts.",
                "For factors with a sign, such as advantages, multiply the loss by them in your own train_step.",
            )
    if training and any(array.size for array in weights) and not any(array.any() for array in weights):
        raise DataError(
            f"HL411: The sample_weight of a batch of {len(weights[0])} examples sums to zero.",
            "The batch teaches nothing, but an optimizer with momentum or decay would still change the model.",
            "Leave out examples that do not count: keep = sample_weight > 0; fit(x[keep], y[keep], "
            "sample_weight=sample_weight[keep]).",
        )


def weights_in(y: Any, sample_weight: Any) -> list[np.ndarray]:
    """The arrays of weights, in host memory, in an argument of a model for sample weights."""
    arrays = [on_host(leaf) for leaf in optree.tree_leaves(sample_weight) if kind_of(leaf) == "dense"]
    several = len(arrays) > 1
    return [array for array in arrays if array.dtype.kind in "biuf" and (several or _is_weight(array, y))]


def weights_in_batch(batch: Any) -> list[np.ndarray]:
    """The same in a batch of a source: only arrays that can be nothing else, with one weight for each example."""
    weights = weights_in(None, batch[2]) if type(batch) is tuple and len(batch) == 3 else []
    return [array for array in weights if _is_weight(array, None)]
