"""What steps return, turned into what is reported: read late, weighted right."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import optree

from handloom._function import Function, Version
from handloom._keras import Tensor, keras
from handloom._watch import Metrics, metrics_used
from handloom.backends import backend
from handloom.errors import StepError

ops = keras.ops

Value: TypeAlias = float | np.ndarray
"""What is reported under one name: a number, or an array for a metric whose result is one."""

# So many results wait on the device before they are read, and the last of them longer: nobody waits for a step
# that is under way.
_READ_AFTER, _LEFT_WAITING = 256, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What the tensors that a `ReportingStep` gives stand for.

    First come packs of scalars, one for each dtype, then metrics that are arrays, then the weight if there is one.

    Attributes:
        names: All names, in the order in which the step returned them.
        packs: For each pack, the names of its scalars.
        averaged: The scalars whose value for an epoch is their mean; of the others it is the last.
        arrays: Names of the metrics that are arrays; their value for an epoch is the last.
        examples: Number of examples in the batch, by which means are weighted.
        weighted: Whether they are weighted by the last tensor instead, the sum of the sample weights.
        metrics: The metrics that the step updates.
    """

    names: tuple[str, ...]
    packs: tuple[tuple[str, ...], ...]
    averaged: frozenset[str]
    arrays: tuple[str, ...]
    examples: int
    weighted: bool
    metrics: tuple[keras.Metric, ...]


Result: TypeAlias = tuple[Contents, Sequence[Tensor]]


class ReportingStep:
    """A step, compiled, together with the report of what it returns.

    Args:
        step: Takes a batch, or the parts of one. Returns a dict of scalars, of metrics, or of dicts of these.
        unpacks: Whether the parts of a tuple are the step's arguments.
        weight: Gives the weight of a batch as a scalar tensor, or `None` to count its examples.
        reset_metrics: Resets the metrics at the start of an epoch. By default the metrics that the step updates are
            reset.
        jit_compile: As for `hl.function`.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        unpacks: bool,
        weight: Callable[..., Tensor | None],
        reset_metrics: Callable[[], None] | None = None,
        jit_compile: bool | str = "auto",
    ) -> None:
        self._unpacks, self._weight, self._reset_metrics = unpacks, weight, reset_metrics
        self._contents: dict[Version, Contents] = {}
        self._fresh: set[int] = set()
        self._last: Contents | None = None

        @functools.wraps(step)
        def reporting(*batch: Any) -> list[Any]:
            # Op by op, a metric's first update of an epoch is the moment to reset it; a compiled step tells before.
            with metrics_used(None if backend.nested else self._renew) as metrics:
                returned = step(*batch)
            report = _Report(getattr(step, "__name__", "step"), returned, metrics)
            return report.packed(_examples(batch), weight(*batch))

        self.function = Function(reporting, jit_compile=jit_compile)

    def start_epoch(self) -> None:
        """The metrics start anew."""
        self._fresh.clear()
        self._last = None
        if self._reset_metrics is not None:
            self._reset_metrics()

    def __call__(self, batch: Any) -> Result:
        """Takes one step; returns before it is computed, where the backend does."""
        version, tensors = self.function.resolve(batch if self._unpacks and type(batch) is tuple else (batch,))
        if not version.compiled:
            flat = version.run(tensors)
            return version.rebuild(flat)[0], flat
        contents = self._contents.get(version)
        if contents is None:
            contents = self._contents[version] = version.static[0]
        if contents is not self._last:
            self._last = contents
            for metric in contents.metrics:
                self._renew(metric)
        return contents, version.run(tensors)

    def _renew(self, metric: keras.Metric) -> None:
        if self._reset_metrics is None and id(metric) not in self._fresh:
            self._fresh.add(id(metric))
            metric.reset_state()


class _Report:
    """A step's returned dict, checked and sorted: what each value is, and under which name."""

    def __init__(self, step: str, returned: Any, metrics: Metrics) -> None:
        if not isinstance(returned, Mapping):
            raise StepError(
                f"{step} must return what is to be reported as a dict of scalars, such as {{'loss': loss}}; it returned "
                f"{_shown(returned)} (of type {type(returned).__name__})."
            )
        self._step, self._metrics = step, metrics
        self._scalars: dict[str, Tensor] = {}
        self._averaged: set[str] = set()
        self._arrays: dict[str, Tensor] = {}
        for name, value in returned.items():
            self._add(str(name), value)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, keras.Metric):
            value = value.result()
            self._metrics.note_result(value)
        if isinstance(value, Mapping):
            for inner, inner_value in value.items():  # Keras's way: a metric of several results has their names.
                self._add(str(inner), inner_value)
            return
        is_result = self._metrics.is_result(value)
        value = self._tensor(name, value)
        if not len(value.shape):
            self._scalars[name] = value
            self._averaged.update(() if is_result else (name,))
        elif is_result:
            self._arrays[name] = value
        else:
            raise StepError(
                f"{self._step} returned a tensor of shape {tuple(value.shape)} as {name!r}; what is reported must be "
                "scalars. Reduce it, for example with keras.ops.mean, or report a keras.Metric."
            )

    def _tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, (keras.Variable, bool, int, float)) or backend.is_array(value):
            return ops.convert_to_tensor(value)
        raise StepError(
            f"{self._step} returned {_shown(value)} (of type {type(value).__name__}) as {name!r}; what is reported must be "
            "scalars (tensors or numbers) or keras.Metric objects."
        )

    def packed(self, examples: int, weight: Tensor | None) -> list[Any]:
        """The contents and, after them, the tensors they stand for."""
        packs: dict[str, list[str]] = {}
        for name, scalar in self._scalars.items():
            packs.setdefault(_pack_dtype(scalar), []).append(name)
        contents = Contents(
            names=(*self._scalars, *self._arrays),
            packs=tuple(map(tuple, packs.values())),
            averaged=frozenset(self._averaged),
            arrays=tuple(self._arrays),
            examples=examples,
            weighted=weight is not None,
            metrics=self._metrics.updated,
        )
        # One tensor for many scalars is one transfer.
        stacks = [
            ops.stack([ops.cast(self._scalars[name], dtype) for name in names]) for dtype, names in packs.items()
        ]
        return [contents, *stacks, *self._arrays.values(), *([] if weight is None else [weight])]


def _pack_dtype(scalar: Tensor) -> str:
    """A dtype that holds the scalar exactly, and that many have in common."""
    dtype = str(keras.backend.standardize_dtype(scalar.dtype))
    return {"bool": "int32", "float16": "float32", "bfloat16": "float32"}.get(dtype, dtype)


def _examples(batch: Any) -> int:
    """The number of examples in a batch: the length of its first array."""
    for leaf in optree.tree_leaves(batch):
        if backend.is_array(leaf) and len(leaf.shape):
            return int(leaf.shape[0])
    return 1


class EpochLogs(Mapping[str, Value]):
    """The results of the steps of one epoch, as one value each: a dict that computes itself when it is looked at.

    A scalar's value is the mean over the steps, weighted by examples (or sample weights), in double precision; a
    metric's is its last result.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._waiting: list[Result] = []
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last: dict[str, Value] = {}

    def add(self, result: Result) -> None:
        """Takes what one step gave, without waiting for it."""
        self._waiting.append(result)
        if len(self._waiting) >= _READ_AFTER:
            self._read(len(self._waiting) - _LEFT_WAITING)

    def __getitem__(self, name: str) -> Value:
        self._read(len(self._waiting))
        if name not in self._sums:
            return self._last[name]
        weight = self._weights[name]
        return self._sums[name] / weight if weight else math.nan

    def __iter__(self) -> Iterator[str]:
        self._read(len(self._waiting))
        return iter(self._last)

    def __len__(self) -> int:
        self._read(len(self._waiting))
        return len(self._last)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _read(self, count: int) -> None:
        """Reads the oldest results, as many at a time as belong together."""
        waiting, self._waiting = self._waiting[:count], self._waiting[count:]
        start = 0
        while start < len(waiting):
            contents, end = waiting[start][0], start + 1
            while end < len(waiting) and waiting[end][0] is contents:
                end += 1
            self._take(contents, [tensors for _, tensors in waiting[start:end]])
            start = end

    def _take(self, contents: Contents, steps: list[Sequence[Tensor]]) -> None:
        """Takes in the results of several steps that return the same things."""
        for name in contents.names:
            self._last.setdefault(name, math.nan)
        weights = np.full(len(steps), float(contents.examples))
        if contents.weighted:
            weights = backend.fetch([tensors[-1] for tensors in steps]).astype(np.float64)
        for position, names in enumerate(contents.packs):
            values = backend.fetch([tensors[position] for tensors in steps]).astype(np.float64)
            # A batch whose weights sum to zero has no part in the mean, whatever its value, even NaN.
            weighted = np.where(weights[:, None] == 0, 0.0, weights[:, None] * values)
            for name, last, total in zip(names, values[-1], weighted.sum(axis=0), strict=True):
                self._last[name] = float(last)
                if name in contents.averaged:
                    self._sums[name] = self._sums.get(name, 0.0) + float(total)
                    self._weights[name] = self._weights.get(name, 0.0) + float(weights.sum())
        for position, name in enumerate(contents.arrays, start=len(contents.packs)):
            self._last[name] = backend.fetch([steps[-1][position]])[0]


def _shown(value: Any) -> str:
    if backend.is_array(value):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
