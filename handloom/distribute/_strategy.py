"""The contract between a run and the devices that it runs on."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np

from handloom._keras import Tensor, Variable
from handloom._util.shard import Shard
from handloom.backends import backend
from handloom.errors import ArgumentError

T = TypeVar("T")


class Strategy(abc.ABC):
    """Where a run's state and data lie, and what its processes do together.

    A step is written for the global batch, and no line of it knows of devices. A run asks its strategy wherever they
    matter: when it reads data, before each update, when it reads reported values, when it decides something, and when
    it saves. Every process asks in the same order.

    Attributes:
        rank: The number of this process, from 0.
        size: How many processes there are.
    """

    rank: int = 0
    size: int = 1

    @abc.abstractmethod
    def place(self, variables: Sequence[Variable]) -> None:
        """Puts variables where they belong; called for all that a run trains, before its first step."""

    @abc.abstractmethod
    def shard(self, examples: slice | np.ndarray) -> slice | np.ndarray:
        """The examples of a global batch that this process reads, of those given by their numbers."""

    @abc.abstractmethod
    def put(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, on the devices."""

    @abc.abstractmethod
    def reduce(self, gradients: list[Tensor | None], weight: Any) -> list[Tensor | None]:
        """The gradients of the global batch, in the trace of a step, before they are unscaled and clipped.

        Args:
            gradients: Those of this process's part of the batch; `None` where there is none, on every process.
            weight: How much that part counts: its examples, or what its loss was divided by.

        Returns:
            `sum(weight * gradient) / sum(weight)` over the processes.
        """

    @abc.abstractmethod
    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array over the processes; on the host, when reported values are read."""

    @abc.abstractmethod
    def agree(self, value: T) -> T:
        """The value that the process of rank 0 has: whether a signal came, a timer is due, a value is the best."""

    @abc.abstractmethod
    def shards_of(self, variable: Variable) -> list[Shard]:
        """The parts of a variable that this process saves.

        Those of all processes together are the variable, each element once. None is empty, unless the variable is.
        """

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Makes this the strategy of the block, for loops by hand; `fit` does so itself."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


class SingleDevice(Strategy):
    """One process and one device: leaves everything as it is, and costs nothing."""

    def place(self, variables: Sequence[Variable]) -> None:
        """They are where they belong."""

    def shard(self, examples: slice | np.ndarray) -> slice | np.ndarray:
        """All of them."""
        return examples

    def put(self, batches: Iterator[Any]) -> Iterator[Any]:
        """They are there."""
        return batches

    def reduce(self, gradients: list[Tensor | None], weight: Any) -> list[Tensor | None]:
        """The part is the whole."""
        del weight
        return gradients

    def sum(self, array: np.ndarray) -> np.ndarray:
        """There is one process."""
        return array

    def agree(self, value: T) -> T:
        """There is nobody to ask."""
        return value

    def shards_of(self, variable: Variable) -> list[Shard]:
        """The whole variable."""
        return [Shard.whole(backend.to_numpy(variable.value))]


_SINGLE = SingleDevice()
_current: ContextVar[Strategy | None] = ContextVar("strategy", default=None)


def current() -> Strategy:
    """The strategy of the run, or of the loop by hand, that the caller is in; by default for a single device."""
    return _current.get() or _SINGLE


def check_strategy(strategy: Strategy | None) -> Strategy:
    """What was given as `strategy=`; by default that of the caller's block.

    Raises:
        ArgumentError: If it is no strategy.
    """
    if strategy is None:
        return current()
    if not isinstance(strategy, Strategy):
        raise ArgumentError(
            f"HL003: strategy takes a strategy of handloom.distribute, or None; received {strategy!r} (of type "
            f"{type(strategy).__name__}).",
        )
    return strategy
