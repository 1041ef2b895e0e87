"""The contract between a run and the devices that it runs on."""

import abc
import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np

from handloom._keras import Tensor, Variable
from handloom._util.shard import Shard
from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import ArgumentError

T = TypeVar("T")


class Strategy(abc.ABC):
    """Places a run's state and data on devices, and combines the results of its processes.

    A step is written for the global batch and does not mention devices. A run calls its strategy where devices matter:
    when it reads data, before each update, when it reads reported values, when it makes a decision, and when it saves.
    All processes call it in the same order.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
    """

    rank: int = 0
    size: int = 1

    @abc.abstractmethod
    def place(self, variables: Sequence[Variable]) -> None:
        """Moves the variables that a run trains to their devices; called before the first step."""

    @abc.abstractmethod
    def shard(self, examples: slice | np.ndarray) -> slice | np.ndarray:
        """Selects the examples that this process reads, from the positions of those of a global batch."""

    @abc.abstractmethod
    def put(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Moves batches to the devices."""

    @abc.abstractmethod
    def reduce(self, gradients: list[Tensor | None], weight: Any) -> list[Tensor | None]:
        """Computes the gradients of the global batch, in the trace of a step, before they are unscaled and clipped.

        Args:
            gradients: The gradients of this process's part of the batch; those that are `None` are so on every process.
            weight: The weight of that part: its number of examples, or the number that its loss was divided by.

        Returns:
            `sum(weight * gradient) / sum(weight)` over the processes.
        """

    @abc.abstractmethod
    def sum(self, array: np.ndarray) -> np.ndarray:
        """Sums an array over the processes, on the host; for reported values."""

    @abc.abstractmethod
    def agree(self, value: T) -> T:
        """Returns the value of the process of rank 0: whether a signal came, a timer is due, a value is the best."""

    @abc.abstractmethod
    def shards_of(self, variable: Variable) -> list[Shard]:
        """Returns the parts of a variable that this process saves.

        The parts of all processes contain each element once. No part is empty, unless the variable is.
        """

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Sets the strategy of a block, for loops by hand; `fit` does so itself."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


class SingleDevice(Strategy):
    """The strategy of one process and one device: leaves everything as it is."""

    def place(self, variables: Sequence[Variable]) -> None:
        """Does nothing."""

    def shard(self, examples: slice | np.ndarray) -> slice | np.ndarray:
        """Returns all examples."""
        return examples

    def put(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Returns the batches as they are."""
        return batches

    def reduce(self, gradients: list[Tensor | None], weight: Any) -> list[Tensor | None]:
        """Returns the gradients as they are."""
        return gradients

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Returns the array as it is."""
        return array

    def agree(self, value: T) -> T:
        """Returns the value as it is."""
        return value

    def shards_of(self, variable: Variable) -> list[Shard]:
        """Returns the whole variable as one part."""
        return [Shard.whole(backend.to_numpy(variable.value))]


_SINGLE = SingleDevice()
_current: ContextVar[Strategy | None] = ContextVar("strategy", default=None)


def current() -> Strategy:
    """The strategy of the caller's run or `scope()`; by default that of a single device."""
    return _current.get() or _SINGLE


def check_strategy(strategy: Strategy | None) -> Strategy:
    """Returns the argument `strategy`; by default the strategy of the caller's block.

    Raises:
        ArgumentError: It is not a strategy.
    """
    if strategy is None:
        return current()
    if not isinstance(strategy, Strategy):
        raise ArgumentError(
            f"HL003: strategy takes a strategy of handloom.distribute, or None; received {short(strategy)} (of type "
            f"{type(strategy).__name__}).",
        )
    return strategy
