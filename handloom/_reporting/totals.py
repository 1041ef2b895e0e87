"""Variables to which steps add what they report, so that the loop neither waits for results nor collects them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from handloom._keras import Tensor, keras
from handloom._trace.observe import OwnVariable
from handloom.backends import backend

ops = keras.ops


class Entry(NamedTuple):
    """One value that a step returned, and how it is reduced to the epoch's value.

    Attributes:
        reduction: The reduction, in words.
        total: The scalar to add up; `None` if only the last value counts.
        weight: The weight to add up beside it: the epoch's value is the one sum divided by the other.
        counts: Whether both are multiplied by the weight of the batch: its examples, or the sum of its sample weights.
        last: The scalar or array that replaces the value of the step before; `None` if the value is averaged.
        source: The metric that returned the value.
    """

    reduction: str
    total: Tensor | None = None
    weight: Tensor | float = 1.0
    counts: bool = False
    last: Tensor | None = None
    source: keras.Metric | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Totals:
    """A variable that holds reported values of one dtype and shape.

    Attributes:
        means: The names of averaged values: first their sums, then their weights.
        lasts: The names of last values, which follow.
        variable: Shape `(2 * means + lasts, ...)`; only last values can be arrays.
    """

    means: tuple[str, ...]
    lasts: tuple[str, ...]
    variable: keras.Variable

    def state(self) -> dict[str, Any]:
        """The names and values, as JSON and an array."""
        return {"means": list(self.means), "lasts": list(self.lasts), "values": self.values()}

    def values(self) -> np.ndarray:
        """The values; waits for the device."""
        return np.array(backend.to_numpy(self.variable.value))


class AllTotals:
    """The totals of one step, shared by all its versions that report the same names."""

    def __init__(self) -> None:
        self._known: dict[Any, Totals] = {}

    def add(self, entries: Mapping[str, Entry], examples: int, weight: Tensor | None) -> tuple[Totals, ...]:
        """Adds what a step returned, inside the compiled step.

        Args:
            entries: The values, by name.
            examples: Number of examples in the batch.
            weight: The sum of its sample weights, a scalar; `None` if it has none.

        Returns:
            The totals that now hold the values.
        """
        packs: dict[tuple[str, tuple[int, ...]], dict[str, Entry]] = {}
        for name, entry in entries.items():
            packs.setdefault(_dtype_and_shape(entry), {})[name] = entry
        return tuple(self._add(*kind, pack, examples, weight) for kind, pack in packs.items())

    def restored(self, state: Mapping[str, Any]) -> Totals:
        """The totals that have this state, with its values in them."""
        values = state["values"]
        totals = self._totals(tuple(state["means"]), tuple(state["lasts"]), str(values.dtype), tuple(values.shape))
        totals.variable.assign(values)
        return totals

    def _totals(self, means: tuple[str, ...], lasts: tuple[str, ...], dtype: str, shape: tuple[int, ...]) -> Totals:
        key = (means, lasts, dtype, shape)
        if key not in self._known:
            variable = OwnVariable("zeros", shape=shape, dtype=dtype, trainable=False, autocast=False, name="totals")
            self._known[key] = Totals(means, lasts, variable)
        return self._known[key]

    def _add(
        self, dtype: str, shape: tuple[int, ...], pack: Mapping[str, Entry], examples: int, weight: Tensor | None
    ) -> Totals:
        means = {name: entry for name, entry in pack.items() if entry.total is not None}
        lasts = {name: entry.last for name, entry in pack.items() if entry.last is not None}
        parts = [entry.total for entry in means.values()] + [entry.weight for entry in means.values()]
        values = ops.stack([ops.cast(part, dtype) for part in [*parts, *lasts.values()]])
        totals = self._totals(tuple(means), tuple(lasts), dtype, (len(parts) + len(lasts), *shape))
        if means:
            counts = np.array([entry.counts for entry in means.values()] * 2 + [False] * len(lasts))
            before = totals.variable.value
            if lasts:
                before = ops.where(np.arange(len(counts)) < len(parts), before, ops.zeros_like(before))
            values = before + _weighted(values, counts, examples, weight, dtype)
        totals.variable.assign(values)
        return totals


def _weighted(values: Tensor, counts: np.ndarray, examples: int, weight: Tensor | None, dtype: str) -> Tensor:
    """Multiplies the values that count by the weight of the batch."""
    if not counts.any():
        return values
    if weight is None:
        return values * ops.convert_to_tensor(np.where(counts, examples, 1), dtype)
    weight = ops.cast(weight, dtype)
    # A batch whose weights sum to zero does not enter the mean, whatever its value, even NaN.
    values = ops.where(ops.logical_and(counts, ops.equal(weight, 0)), ops.zeros_like(values), values)
    return values * ops.where(counts, weight, ops.ones_like(weight))


def _dtype_and_shape(entry: Entry) -> tuple[str, tuple[int, ...]]:
    """A dtype that holds the value, or its mean, exactly, and that as many as possible share; and the shape."""
    value: Tensor = entry.last if entry.total is None else entry.total
    dtype = str(keras.backend.standardize_dtype(value.dtype))
    is_kept = dtype == "float64" or (entry.total is None and "float" not in dtype)
    return dtype if is_kept else "float32", tuple(value.shape)
