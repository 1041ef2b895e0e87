"""What Handloom needs of a backend: the whole of it, method by method.

A backend turns the same words (compile this step, differentiate this function) into what JAX, TensorFlow
or PyTorch does. It knows nothing of models, loops or data; it is told only functions, tensors and variables.
Everything above it is written once. If a feature needs to know which backend runs, a method is missing here.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from handloom._keras import Tensor, Variable, keras
from handloom.backends.program import Program, Step

Gradients = list[Tensor | None]


class Backend(abc.ABC):
    """The contract. `handloom.backends.backend` is the one implementation that this process uses."""

    name: str
    holds_text = False
    """Whether its tensors may hold text."""

    def __init__(self) -> None:
        self._nesting = _Nesting()

    # ---------------------------------------------------------------- tensors

    @abc.abstractmethod
    def is_array(self, leaf: Any) -> bool:
        """Whether a leaf of a step's arguments is data (retraces by shape and dtype) or a Python value (static).

        True for tensors of the backend, NumPy arrays and NumPy scalars; false for Python numbers and
        `keras.Variable`s.
        """

    @abc.abstractmethod
    def to_tensor(self, array: Any) -> Tensor:
        """What a step is given for one leaf of data.

        One rule for the three backends: 64-bit floats become `keras.config.floatx()`; every other dtype is kept
        (JAX, which has no 64-bit integers unless told to, makes them 32-bit). No copy where none is needed; where
        the backend's compiled functions take NumPy arrays at no cost, an array may be returned as it is.
        """

    def sparse_tensor(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Tensor | None:
        """A sparse tensor, to be given to `to_tensor`; `None` where the backend, or Keras on it, has none.

        Args:
            indices: Where the values stand; whole numbers of shape `(stored, len(shape))`.
            values: Of shape `(stored,)`; everything else is zero.
            shape: That of the tensor.
        """
        del indices, values, shape  # None by default.
        return None

    @abc.abstractmethod
    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        """Shape and dtype name, as a compiled function tells versions apart. Takes what `to_tensor` returns."""

    def placement(self, tensor: Tensor) -> Hashable:
        """Where a tensor lies, if not where the backend puts tensors by itself; else `None`."""
        del tensor
        return None  # By default there is one place.

    def key(self, leaf: Any) -> Hashable:
        """What tells two leaves of a step's arguments apart at little cost: shape, dtype, kind and placement.

        Raises:
            AttributeError: If it is no array.
        """
        return leaf.shape, leaf.dtype, type(leaf)

    @abc.abstractmethod
    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor, once it is computed, as a NumPy array; not to be written to."""

    @abc.abstractmethod
    def detach(self, tensor: Tensor) -> Tensor:
        """The tensor by itself: no computation that made it is kept alive, and no variable or array changes it."""

    # ------------------------------------------------------------------- state

    def versions(self) -> dict[str, str]:
        """The backend, and its version: for the record."""
        return {"backend": self.name, self.name: str(importlib.import_module(self.name).__version__)}

    def attributes(self, thing: Any) -> dict[str, Any]:
        """The attributes of a Keras object by name, wherever it keeps them on this backend."""
        return dict(vars(thing))

    def random_state(self) -> dict[str, np.ndarray]:
        """What the backend's own random operations draw from, apart from `keras.random`; nothing by default."""
        return {}

    def set_random_state(self, state: dict[str, np.ndarray]) -> None:
        """Puts back what `random_state` gave; what another backend gave is passed over."""
        del state  # Nothing by default.

    def seed_random_state(self, seed: int) -> None:
        """Sets what `random_state` gives, where `keras.utils.set_random_seed` does not; nothing by default."""
        del seed

    @abc.abstractmethod
    def profiled(self, directory: Path) -> contextlib.AbstractContextManager[Any]:
        """Traces what runs within, host and device, and writes it at the end, as the backend's own tools read it.

        Args:
            directory: What TensorBoard would know as a run; made if it is not there.
        """

    # --------------------------------------------------------------- exporting

    def exporting(self, format: str) -> contextlib.AbstractContextManager[None]:  # noqa: A002  Keras's name.
        """Where Keras exports a model.

        Args:
            format: As for `keras.Model.export`.

        Raises:
            ExportError: If the format cannot be written on this backend; says what to do instead.
        """
        del format  # By default Keras can.
        return contextlib.nullcontext()

    # --------------------------------------------------------------- compiling

    @abc.abstractmethod
    def trace(
        self,
        fn: Step,
        tensors: Sequence[Tensor],
        *,
        jit_compile: bool | str,
        seen: Mapping[int, Variable] = MappingProxyType({}),
    ) -> Program | None:
        """Compiles `fn(*tensors)` for the shapes and dtypes of `tensors`, finding its variables by itself.

        `fn` may be run more than once, on stand-ins for the tensors; no variable keeps a value from that.
        Variables that `fn` creates in its first run are initialized before the next.

        Args:
            fn: Takes tensors, returns a list of tensors; reads and writes any variables.
            tensors: One set of arguments, from `to_tensor`.
            jit_compile: `True` for the backend's kernel compiler (XLA, Inductor), `False` to do without,
                `"auto"` for what is known to be best.
            seen: The variables that `fn` was seen to use, by id; filled while it runs.

        Returns:
            The program; `None` where `jit_compile=False` leaves nothing but running eagerly.

        Raises:
            Untraceable: If `fn` cannot be compiled on this backend but may run eagerly.
            TraceError: If `fn` uses a tensor where Python needs a number, as in `if loss < 1:`.
        """

    @abc.abstractmethod
    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        """Whether `trace` uses the backend's kernel compiler, so told: what `"auto"` comes to on this machine."""

    def with_control_flow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A user's function, made ready for the control flow in it.

        A backend that can compile plain Python `if`, `for` and `while` over tensors rewrites it here; one whose
        `keras.ops.cond` loses what a branch assigns mends that here.
        """
        return fn

    def cond(self, pred: Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
        """Runs one of two functions by a condition known when the step runs; either may assign variables.

        Args:
            pred: A scalar.
            true_fn: Takes nothing; returns tensors in any structure, of the same shapes and dtypes as the other.
            false_fn: Likewise.
        """
        return keras.ops.cond(pred, true_fn, false_fn)

    def marked(self, tensor: Tensor, name: str) -> Tensor:
        """The same tensor, marked in the program that is traced; outside of a trace just the same.

        `Program.dependencies` tells what depends on it. One in a branch or a loop is not followed, and counts as used.
        """
        return self._mark(tensor, name) if self._nesting.trace else tensor

    @abc.abstractmethod
    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        """An identity that can be found again, by its name, in the program that is traced."""

    @abc.abstractmethod
    def create_variables(self, fn: Callable[[], Any]) -> None:
        """Runs `fn()` on shapes alone, so that layers it calls are built; no value changes."""

    # ---------------------------------------------------------- differentiating

    @abc.abstractmethod
    def value_and_grad(
        self,
        fn: Callable[..., tuple[Tensor, list[Tensor]]],
        tensors: Sequence[Tensor],
        variables: Sequence[Variable],
    ) -> tuple[Tensor, list[Tensor], Gradients, Gradients]:
        """Runs `fn(*tensors)` once and differentiates its value.

        Args:
            fn: Returns a scalar floating-point tensor and a list of further tensors. What it does to variables
                happens exactly once.
            tensors: Floating-point tensors to differentiate with respect to; `fn` is given stand-ins for them.
            variables: Distinct variables to differentiate with respect to, at the values they have now.

        Returns:
            The value; the further tensors; the gradients for `tensors`; those for `variables`. A gradient has the
            shape and dtype of its source, and is `None` where the source does not reach the value through
            differentiable operations. That of a table in which few rows were looked up may be in a form of its own,
            of which `dense` makes a tensor. Inside another differentiated function all stay differentiable.
        """

    def dense(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient as a tensor, whatever form it has."""
        return gradient

    @abc.abstractmethod
    def jacobian(
        self,
        fn: Callable[..., tuple[list[Tensor], list[Tensor]]],
        tensors: Sequence[Tensor],
        variables: Sequence[Variable],
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[Gradients, Gradients]]]:
        """The derivatives of several outputs of any shape.

        Args:
            fn: Returns a list of floating-point tensors, the outputs, and a list of further tensors. What it does to
                variables happens exactly once.
            tensors: As for `value_and_grad`.
            variables: As for `value_and_grad`.

        Returns:
            The outputs; the further tensors; for each output a pair as the last two of `value_and_grad`, in which a
            derivative has shape `output.shape + source.shape`.
        """

    # ------------------------------------------------------------------ nesting

    @property
    def nested(self) -> bool:
        """Whether the caller runs inside a trace or a differentiated function.

        Compiled functions called there become part of what surrounds them.
        """
        return self._nesting.trace > 0 or self._nesting.gradient > 0

    @contextlib.contextmanager
    def _inside(self, kind: str) -> Iterator[None]:
        depth = getattr(self._nesting, kind)
        setattr(self._nesting, kind, depth + 1)
        try:
            yield
        finally:
            setattr(self._nesting, kind, depth)


class _Nesting(threading.local):
    """How many traces and differentiated functions a thread is in."""

    trace = 0
    gradient = 0
