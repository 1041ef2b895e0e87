"""PyTorch's `DataLoader` on any backend: its position is restored without reading the examples before it.

The order in which the sampler lists the examples decides the batches of a pass, and it follows from the generators that
the sampler draws from. The state of these generators before the pass is saved; to resume, the same order is drawn again
and its first batches are skipped.
"""

import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Samplers of PyTorch, which draw from PyTorch's generators and from nothing else.
_SAMPLERS = {f"{kind}Sampler" for kind in ("Distributed", "Random", "Sequential", "SubsetRandom", "WeightedRandom")}
# Options of a `DataLoader` that its sampler of batches replaces.
_REPLACED = {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"}


def torch_data(data: Any) -> "TorchData | None":
    """The reader of a `DataLoader` over numbered examples with a sampler of PyTorch; `None` for any other data."""
    utils = getattr(sys.modules.get("torch"), "utils", None)
    # Subclasses are left out: they may do anything.
    if utils is None or type(data) is not utils.data.DataLoader:
        return None
    if type(data.batch_sampler) is not utils.data.BatchSampler:
        return None
    sampler = type(data.batch_sampler.sampler)
    known = sampler.__module__.startswith("torch.utils.data.") and sampler.__name__ in _SAMPLERS
    return TorchData(data) if known else None


class TorchData:
    """Reads a `DataLoader`; see `Reader` in `handloom/_data/sources/stream.py`."""

    exact = True

    def __init__(self, data: Any) -> None:
        own = (data.generator, getattr(data.batch_sampler.sampler, "generator", None))
        distinct = {id(generator): generator for generator in own if generator is not None}
        self._generators = [sys.modules["torch"].default_generator, *distinct.values()]
        self._order = _Order(data.batch_sampler, self._generators)
        names = inspect.signature(type(data)).parameters.keys() - _REPLACED
        options = {name: getattr(data, name) for name in names}
        self._loader = type(data)(data.dataset, batch_sampler=self._order, **options)

    def begin(self) -> Iterator[Any]:
        self._order.begin()
        return iter(self._loader)

    def state(self) -> dict[str, Any]:
        return {"now": _states(self._generators), "drawn_from": self._order.drawn_from}

    def resume(self, state: dict[str, Any], batch: int | None) -> Iterator[Any] | None:
        now, drawn_from = state["now"], state["drawn_from"]
        _set(self._generators, now)
        if batch is None:
            return None
        self._order.begin(drawn_from, batch)
        iterator: Iterator[Any] = iter(self._loader)
        # The loader has just drawn a seed for its workers, which the saved states already include. Generators of its
        # own are in the right state, or will be as soon as the order is drawn.
        _set(self._generators, now if drawn_from is None else now[:1])
        return iterator


class _Order:
    """A sampler of batches that begins at a given batch. The loader may ask for it before it reads any batch.

    Args:
        sampler: The original sampler of batches.
        generators: The generators that it may draw from: PyTorch's global generator, then those of the loader.
    """

    def __init__(self, sampler: Any, generators: Sequence[Any]) -> None:
        self._sampler, self._generators = sampler, generators
        self.begin()

    def begin(self, drawn_from: list[Any] | None = None, batch: int = 0) -> None:
        """Makes the next pass begin at a batch, in the order drawn from these states, by default the current ones."""
        self.drawn_from, self._batch = drawn_from, batch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        if self.drawn_from is None:
            self.drawn_from = _states(self._generators)
            yield from self._sampler
            return
        now = _states(self._generators)
        _set(self._generators, self.drawn_from)
        order = itertools.islice(self._sampler, self._batch, None)
        first = list(itertools.islice(order, 1))
        _set(self._generators, now[:1])  # Other code draws from the global generator too; the order is drawn by now.
        yield from first
        yield from order


def _states(generators: Sequence[Any]) -> list[Any]:
    return [generator.get_state() for generator in generators]


def _set(generators: Sequence[Any], states: Sequence[Any]) -> None:
    """Sets as many generators as there are states."""
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)
