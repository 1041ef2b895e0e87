"""One compiled version of a step, its state in the open."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

from handloom._keras import Tensor, Variable
from handloom.backends.dependencies import Dependencies

Step: TypeAlias = Callable[..., Sequence[Tensor]]
"""Takes tensors and returns tensors; reads and writes any variables."""

Fused: TypeAlias = Callable[[Sequence[Sequence[Tensor]]], Sequence[Tensor]]
"""Runs a program once on each of several sets of tensors; returns the results of the last."""


class Untraceable(Exception):
    """Raised where something cannot be compiled on this backend but may run eagerly; its text is the reason."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run takes, as far as the compiler tells; else `None`.

    Attributes:
        flops: Floating-point operations.
        bytes: Bytes read from and written to memory.
        peak_bytes: The most memory used at a time: arguments, results and what is in between.
    """

    flops: float | None = None
    bytes: float | None = None
    peak_bytes: int | None = None


class Program(abc.ABC):
    """One compiled version of a step, for one set of shapes and dtypes.

    Attributes:
        written: The variables that it assigns.
        read: The variables that it only reads.
        dependencies: What depends on what in it.
    """

    written: tuple[Variable, ...]
    read: tuple[Variable, ...]
    dependencies = Dependencies()

    @abc.abstractmethod
    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Runs it once: reads the variables' present values, writes the new ones, returns the results.

        An exception, an interrupt included, leaves every variable with either its old or its new value.
        """

    @abc.abstractmethod
    def pure(
        self, written: Sequence[Tensor], read: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs it once on other values than its variables have; no variable and no argument changes.

        Args:
            written: A value for each variable in `written`.
            read: A value for each variable in `read`.
            tensors: The step's arguments.

        Returns:
            The new values of `written`, and the results.
        """

    def fused(self, steps: int, how: str = "auto") -> Fused | None:
        """Several runs in one dispatch, with the numbers of as many single ones.

        Args:
            steps: How many.
            how: `"rolled"`, as a loop; `"unrolled"`, written out; `"auto"` for what is usually faster.

        Returns:
            What runs it on so many sets of tensors, alike in shapes and dtypes; `None` where nothing is gained.

        Raises:
            Untraceable: If such tensors can be taken only one set after the other.
        """
        del steps, how  # By default nothing is gained.
        return None

    def cost(self) -> Cost:
        """What one run takes."""
        return Cost()
