"""Torch's `DataLoader`, whichever library is the backend: positioned by its sampler, without reading what was given.

What a pass gives follows from the order in which the sampler names examples, and that from the generators it draws
from. Where these stood before is saved; to go on, the same order is drawn again, and its first part left out.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Those of torch, which draw from torch's generators and from nothing else.
_SAMPLERS = {
    "DistributedSampler",
    "RandomSampler",
    "SequentialSampler",
    "SubsetRandomSampler",
    "WeightedRandomSampler",
}
_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def seed_sources_of_data(seed: int) -> None:
    """Seeds the generator that a `DataLoader` draws its order from; that of `tf.data` is seeded by Keras."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def torch_data(data: Any) -> TorchData | None:
    """What reads data that is a `DataLoader` over numbered examples, in an order that is torch's own to draw."""
    utils = getattr(sys.modules.get("torch"), "utils", None)
    # No subclass, which may do anything.
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
        self._generators = _Generators(own)
        self._order = _Order(data.batch_sampler, self._generators)
        options = {name: getattr(data, name) for name in _OPTIONS}
        self._loader = type(data)(data.dataset, batch_sampler=self._order, **options)

    def begin(self) -> Iterator[Any]:
        self._order.begin()
        return iter(self._loader)

    def state(self) -> dict[str, Any]:
        return {"now": self._generators.state(), "drawn_from": self._order.drawn_from}

    def go_on(self, state: dict[str, Any], batch: int | None) -> Iterator[Any] | None:
        now, drawn_from = state["now"], state["drawn_from"]
        self._generators.set(now)
        if batch is None:
            return None
        self._order.begin(drawn_from, batch)
        iterator: Iterator[Any] = iter(self._loader)
        # That drew a seed for workers, as it had been drawn before. Generators of the loader's own stand right, or will
        # as soon as the order is drawn.
        self._generators.set(now if drawn_from is None else now[:1])
        return iterator


class _Order:
    """A sampler of batches, from one of them on. Asked by the loader, perhaps before the batches are."""

    def __init__(self, sampler: Any, generators: _Generators) -> None:
        self._sampler, self._generators = sampler, generators
        self.begin()

    def begin(self, drawn_from: list[Any] | None = None, batch: int = 0) -> None:
        """Has the next pass begin with that batch, in the order that such generators draw; by default as they stand."""
        self.drawn_from, self._batch = drawn_from, batch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        if self.drawn_from is None:
            self.drawn_from = self._generators.state()
            yield from self._sampler
            return
        now = self._generators.state()
        self._generators.set(self.drawn_from)
        order = itertools.islice(self._sampler, self._batch, None)
        first = list(itertools.islice(order, 1))
        self._generators.set(now[:1])  # Others draw from that one too; where it stands is no matter of the order.
        yield from first
        yield from order


class _Generators:
    """What a loader may draw from: torch's own generator, then those that it was given."""

    def __init__(self, own: Sequence[Any]) -> None:
        distinct = {id(generator): generator for generator in own if generator is not None}
        self._all = [sys.modules["torch"].default_generator, *distinct.values()]

    def state(self) -> list[Any]:
        return [generator.get_state() for generator in self._all]

    def set(self, states: Sequence[Any]) -> None:
        """Sets as many of them as there are states."""
        for generator, state in zip(self._all, states, strict=False):
            generator.set_state(state)
