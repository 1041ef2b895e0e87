"""Variables in which steps add up what they report, so that the loop neither waits for results nor collects them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from handloom._keras import Tensor, keras
from handloom._trace.observe import OwnVariable
from handloom.backends import backend

ops = keras.ops


class Entry(NamedTuple):
    """One value that a step returned, as it is reduced to the value of an epoch.

    Attributes:
        reduction: How, in words.
        total: What is added up, a scalar; `None` for a value of which only the last counts.
        weight: What is added up beside it: the epoch's value is one sum over the other.
        counts: Whether both are multiplied by what the batch counts: its examples, or the sum of its sample weights.
        last: What replaces the value of the step before, a scalar or an array; `None` for a value that is averaged.
        source: The metric whose result it is.
    """

    reduction: str
    total: Tensor | None = None
    weight: Tensor | float = 1.0
    counts: bool = False
    last: Tensor | None = None
    source: keras.Metric | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Totals:
    """A variable with some of what is reported.

    Attributes:
        means: The names of what is averaged. The sums come first, then the weights.
        lasts: The names of what has its last value, after those; or the only name, of an array.
        variable: Shape `(2 * means + lasts,)`, or that of the array.
    """

    means: tuple[str, ...]
    lasts: tuple[str, ...]
    variable: keras.Variable

    def state(self) -> dict[str, Any]:
        """What they are and what stands in them, as JSON and an array."""
        return {"means": list(self.means), "lasts": list(self.lasts), "values": self.values()}

    def values(self) -> np.ndarray:
        """What stands in them; waits for the device."""
        return np.array(backend.to_numpy(self.variable.value))


class AllTotals:
    """The totals of one step, the same for every version of it that reports the same."""

    def __init__(self) -> None:
        self._known: dict[Any, Totals] = {}

    def add(self, entries: Mapping[str, Entry], examples: int, weight: Tensor | None) -> tuple[Totals, ...]:
        """Adds what a step returned: part of the compiled step.

        Args:
            entries: By name.
            examples: Examples in the batch.
            weight: The sum of its sample weights, a scalar; `None` where there are none.

        Returns:
            The totals that have it.
        """
        packs: dict[str, dict[str, Entry]] = {}
        for name, entry in entries.items():
            if not _is_array(entry):
                packs.setdefault(_dtype(entry), {})[name] = entry
        found = [self._add(dtype, pack, examples, weight) for dtype, pack in packs.items()]
        return (*found, *(self._keep(name, entry.last) for name, entry in entries.items() if _is_array(entry)))

    def restored(self, state: Mapping[str, Any]) -> Totals:
        """The totals of such a state, with its values in them."""
        values = state["values"]
        found = self._totals(tuple(state["means"]), tuple(state["lasts"]), str(values.dtype), tuple(values.shape))
        found.variable.assign(values)
        return found

    def _totals(self, means: tuple[str, ...], lasts: tuple[str, ...], dtype: str, shape: tuple[int, ...]) -> Totals:
        key = (means, lasts, dtype, shape)
        if key not in self._known:
            variable = OwnVariable("zeros", shape=shape, dtype=dtype, trainable=False, autocast=False, name="totals")
            self._known[key] = Totals(means, lasts, variable)
        return self._known[key]

    def _add(self, dtype: str, pack: Mapping[str, Entry], examples: int, weight: Tensor | None) -> Totals:
        means = {name: entry for name, entry in pack.items() if entry.total is not None}
        lasts = {name: entry for name, entry in pack.items() if entry.last is not None}
        count = 2 * len(means) + len(lasts)
        totals = self._totals(tuple(means), tuple(lasts), dtype, (count,))
        parts = [entry.total for entry in means.values()] + [entry.weight for entry in means.values()]
        values = ops.stack([ops.cast(part, dtype) for part in [*parts, *(entry.last for entry in lasts.values())]])
        counts = np.array([entry.counts for entry in means.values()] * 2 + [False] * len(lasts))
        before, is_sum = totals.variable.value, np.arange(count) < 2 * len(means)
        if not is_sum.all():
            before = ops.where(is_sum, before, ops.zeros_like(before))
        totals.variable.assign(before + _weighted(values, counts, examples, weight, dtype))
        return totals

    def _keep(self, name: str, array: Tensor | None) -> Totals:
        assert array is not None
        dtype = str(keras.backend.standardize_dtype(array.dtype))
        totals = self._totals((), (name,), dtype, tuple(array.shape))
        totals.variable.assign(array)
        return totals


def _weighted(values: Tensor, counts: np.ndarray, examples: int, weight: Tensor | None, dtype: str) -> Tensor:
    """The values times what the batch counts, where they are to be multiplied by that."""
    if not counts.any():
        return values
    if weight is None:
        return values * ops.convert_to_tensor(np.where(counts, examples, 1), dtype)
    weight = ops.cast(weight, dtype)
    # A batch whose weights sum to zero has no part in the mean, whatever its value, even NaN.
    values = ops.where(ops.logical_and(counts, ops.equal(weight, 0)), ops.zeros_like(values), values)
    return values * ops.where(counts, weight, ops.ones_like(weight))


def _is_array(entry: Entry) -> bool:
    return entry.last is not None and len(entry.last.shape) > 0


def _dtype(entry: Entry) -> str:
    """A dtype that holds the scalar, or its mean, exactly, and that many have in common."""
    value = entry.last if entry.total is None else entry.total
    assert value is not None
    dtype = str(keras.backend.standardize_dtype(value.dtype))
    return dtype if dtype == "float64" or (entry.total is None and "int" in dtype) else "float32"


def names_of(totals: Sequence[Totals]) -> list[str]:
    """All names in some totals."""
    return [name for each in totals for name in (*each.means, *each.lasts)]
