"""Programs of the backend of this process, made and run on arrays."""

from collections.abc import Callable, Sequence
from typing import Any

from handloom._trace.observe import VariableUse, observing
from handloom.backends import backend
from handloom.backends.program import Program


def traced(fn: Callable[..., Any], *arrays: Any, jit_compile: bool | str = "auto") -> Program | Any:
    """The program of a function that takes tensors and returns a list of tensors."""
    use = VariableUse()

    def observed(*arguments: Any) -> Any:
        with observing(use):
            return fn(*arguments)

    return backend.trace(observed, tensors(*arrays), jit_compile=jit_compile, seen=use.known)


def run(program: Program, *arrays: Any) -> Sequence[Any]:
    """Runs a program once."""
    return program(tensors(*arrays))


def tensors(*arrays: Any) -> list[Any]:
    """Tensors of the backend for arrays."""
    return list(map(backend.to_tensor, arrays))
