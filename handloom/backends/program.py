"""Programs: compiled versions of a step, whose variables are known."""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from handloom._keras import Tensor, Tensors, Variable
from handloom.backends.dependencies import Dependencies

Step: TypeAlias = Callable[..., Tensors]
"""Takes tensors and returns tensors; reads and writes any variables."""

Seen: TypeAlias = Mapping[int, Variable]
"""The variables that a step uses, by id; filled while it runs."""

Tracing: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes the context in which a step is traced."""

Fused: TypeAlias = Callable[[Sequence[Tensors]], Tensors]
"""Runs a program once on each of several sets of tensors; returns the results of the last run."""


class Untraceable(Exception):
    """Something cannot be compiled on this backend but can run eagerly.

    Args:
        reason: Says why.
        unsaved: As for `Program`.
    """

    def __init__(self, reason: str, unsaved: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.unsaved = unsaved


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run; `None` for what the compiler does not tell.

    Attributes:
        flops: Floating-point operations.
        bytes: Bytes read from and written to memory.
        peak_bytes: Peak memory: arguments, results and intermediate values.
    """

    flops: float | None = None
    bytes: float | None = None
    peak_bytes: int | None = None


class Program(abc.ABC):
    """One compiled version of a step, for one set of shapes and dtypes.

    Attributes:
        written: The variables that it assigns.
        read: The variables that it only reads.
        dependencies: The dependencies between its marked tensors.
        unsaved: The state that it uses apart from Keras variables, in words: no checkpoint holds it.
        compiles_in_first_run: Whether its first run compiles kernels.
    """

    written: tuple[Variable, ...]
    read: tuple[Variable, ...]
    dependencies = Dependencies()
    unsaved: Sequence[str] = ()
    compiles_in_first_run = False

    @abc.abstractmethod
    def __call__(self, tensors: Tensors) -> Tensors:
        """Runs once: reads the values of the variables, writes their new values, returns the results.

        After an exception or an interrupt, each variable has either its old or its new value.
        """

    @abc.abstractmethod
    def pure(self, written: Tensors, read: Tensors, tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Runs once on given values in place of the variables'; no variable and no argument changes.

        Args:
            written: A value for each variable in `written`.
            read: A value for each variable in `read`.
            tensors: The step's arguments.

        Returns:
            The new values of `written`, and the results.
        """

    def fused(self, steps: int) -> Fused | None:
        """Compiles several runs into one dispatch, with the same results.

        Args:
            steps: The number of runs.

        Returns:
            A function of so many sets of tensors of the same shapes and dtypes; `None` if the backend has none.

        Raises:
            Untraceable: The tensors cannot be stacked.
        """
        return None

    def cost(self) -> Cost:
        """The cost of one run."""
        return Cost()
