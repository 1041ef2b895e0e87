"""The contract of a backend, method by method.

A backend compiles steps and differentiates functions with JAX, TensorFlow or PyTorch. It knows functions, tensors and
variables, and nothing of models, loops or data. All other code is written once for the three backends. If a feature
needs to know which backend runs, this contract lacks a method.
"""

import abc
import contextlib
import importlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from handloom._keras import Gradients, Tensor, Tensors, Variables, keras, outside_of_scopes
from handloom._util.patch import Patch
from handloom._util.switch import Switch
from handloom.backends.program import Program, Seen, Step
from handloom.backends.scope import Scope
from handloom.backends.takes_data import check_takes_data
from handloom.backends.trace_errors import naming_what_has_no_derivative
from handloom.errors import TraceError

Derivatives = tuple[list[Tensor], list[Tensor], list[Gradients]]

Outputs = Callable[..., tuple[list[Tensor], list[Tensor]]]
"""Takes tensors; returns the tensors to differentiate, and further tensors."""


class Backend(abc.ABC):
    """The contract. `handloom.backends.backend` is the implementation that this process uses."""

    name: str
    title: str
    """The name in messages."""
    tested: tuple[str, str]
    """The lowest and the highest version that Handloom was tested with (`docs/compatibility.md`)."""
    holds_text = False
    """Whether its tensors can hold text."""
    outside: Callable[[], contextlib.AbstractContextManager[Any]]
    """Makes a context that is outside of all traces of the backend."""
    in_steps: Patch
    """Inside, layers are built outside of traces, and operators promote dtypes; see `building.py`, `operators.py`."""

    def __init__(self) -> None:
        self._in_trace, self._depth = Switch(False), Switch(0)
        self._zero: Switch[Any] = Switch(0.0)  # A source of the differentiated function that the caller is in.

    # ---------------------------------------------------------------- tensors

    @abc.abstractmethod
    def is_array(self, leaf: Any) -> bool:
        """Whether a leaf of a step's arguments is data (retraces by shape and dtype) or a Python value (static).

        True for tensors of the backend, NumPy arrays and NumPy scalars; false for Python numbers and
        `keras.Variable`s.
        """

    def is_passed_by_value(self, leaf: Any) -> bool:
        """Whether a leaf of a step's arguments is data that the step cannot assign: not a variable of the backend."""
        return self.is_array(leaf)

    @abc.abstractmethod
    def to_tensor(self, array: Any) -> Tensor:
        """Converts one leaf of data for a step.

        The rule is the same on the three backends: 64-bit floats become `keras.config.floatx()`; every other dtype is
        kept (JAX makes 64-bit integers 32-bit by default). Nothing is copied without need: if the backend's compiled
        functions accept NumPy arrays at no cost, the array may be returned as it is.
        """

    def sparse_tensor(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Tensor | None:
        """A sparse tensor for `to_tensor`; `None` if the backend, or Keras on it, has no sparse tensors.

        Args:
            indices: The places of the values; whole numbers of shape `(stored, len(shape))`.
            values: The values, of shape `(stored,)`; all others are zero.
            shape: The shape of the tensor.
        """
        return None

    @abc.abstractmethod
    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        """Shape and dtype name of a tensor from `to_tensor`, which distinguish the versions of a compiled function."""

    def placement(self, tensor: Tensor) -> Hashable:
        """The devices of a tensor that is not on the default device; else `None`."""
        return None  # By default there is one device.

    def key(self, leaf: Any) -> Hashable:
        """A cheap key of a leaf of a step's arguments: shape, dtype, type and placement.

        Raises:
            AttributeError: The leaf is not an array.
        """
        return leaf.shape, leaf.dtype, type(leaf)

    @abc.abstractmethod
    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor as a NumPy array, once they are computed. Do not write to it."""

    def result(self, tensor: Tensor) -> Any:
        """A tensor as a user gets it from `predict`: a NumPy array, or itself if no array can hold its values."""
        return keras.ops.convert_to_numpy(tensor)

    def joined(self, results: Sequence[Any]) -> Any:
        """Results of several batches, along their first axis."""
        return np.concatenate(results) if len(results) > 1 else results[0]

    @abc.abstractmethod
    def detach(self, tensor: Tensor) -> Tensor:
        """The tensor by itself: it keeps no computation alive, and no variable or array changes it."""

    # ------------------------------------------------------------------- state

    def versions(self) -> dict[str, str]:
        """The backend and its version, for the record."""
        return {"backend": self.name, self.name: str(importlib.import_module(self.name).__version__)}

    def attributes(self, thing: Any) -> dict[str, Any]:
        """The attributes of a Keras object by name, wherever the backend keeps them."""
        return dict(vars(thing))

    def random_state(self) -> dict[str, np.ndarray]:
        """The state of the backend's own random operations, apart from `keras.random`; empty by default."""
        return {}

    def set_random_state(self, state: dict[str, np.ndarray]) -> None:
        """Restores a state from `random_state`; ignores that of another backend."""

    def seed_random_state(self, seed: int) -> None:
        """Seeds that state, as far as it is not the libraries' own; nothing by default."""

    @abc.abstractmethod
    def profiled(self, directory: Path) -> contextlib.AbstractContextManager[Any]:
        """Profiles a block on host and device, and writes the profile in the backend's own format.

        Args:
            directory: The directory of a TensorBoard run; it is created.
        """

    # --------------------------------------------------------------- exporting

    def exporting(self, format: str) -> contextlib.AbstractContextManager[None]:  # noqa: A002  Keras's name.
        """Where Keras exports a model.

        Args:
            format: As for `keras.Model.export`.

        Raises:
            ExportError: If the format cannot be written on this backend; says what to do instead.
        """
        return contextlib.nullcontext()

    # --------------------------------------------------------------- compiling

    def trace(
        self, fn: Step, tensors: Tensors, *, jit_compile: bool | str, seen: Seen = MappingProxyType({})
    ) -> Program | None:
        """Compiles `fn(*tensors)` for the shapes and dtypes of `tensors`; finds its variables by itself.

        `fn` may run more than once, on symbolic tensors; no variable keeps a value from that. Variables that `fn`
        creates in its first run are initialized before the next.

        Args:
            fn: Takes tensors, returns a list of tensors; reads and writes any variables.
            tensors: One set of arguments, from `to_tensor`.
            jit_compile: `True` for the backend's kernel compiler (XLA, Inductor), `False` not to use it, `"auto"` for
                the choice that is known to be best.
            seen: The variables that `fn` uses, by id; filled while it runs.

        Returns:
            The program; `None` if `jit_compile=False` leaves eager execution only.

        Raises:
            Untraceable: `fn` cannot be compiled on this backend but can run eagerly.
            TraceError: `fn` uses a tensor where Python needs a number, as in `if loss < 1:`.
        """
        return self._program(fn, tensors, seen, self.compiles_kernels(jit_compile))

    @abc.abstractmethod
    def _program(self, fn: Step, tensors: Tensors, seen: Seen, kernels: bool) -> Program | None:
        """See `trace`; `kernels` tells whether to use the kernel compiler."""

    @abc.abstractmethod
    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        """Whether `trace` uses the backend's kernel compiler; resolves `"auto"` for this machine."""

    def with_control_flow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Prepares a user's function for the control flow in it.

        A backend that compiles plain Python `if`, `for` and `while` over tensors rewrites it here. A backend whose
        `keras.ops.cond` loses assignments in branches fixes that here.
        """
        return fn

    def cond(self, pred: Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
        """Runs one of two functions by a condition known when the step runs; both may assign variables.

        Args:
            pred: A scalar.
            true_fn: Takes no arguments. Both return the same structure of tensors, of the same shapes and dtypes.
            false_fn: The other function.
        """
        return keras.ops.cond(pred, true_fn, false_fn)

    def marked(self, tensor: Tensor, name: str) -> Tensor:
        """The same tensor, marked in the program that is traced; outside of a trace, the tensor itself.

        `Program.dependencies` follows marked tensors. A mark inside a branch or loop is not followed and counts as
        used.
        """
        return self._mark(tensor, name) if self._in_trace.get() else tensor

    @abc.abstractmethod
    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        """An identity operation that can be found by name in the traced program."""

    def unreadable(self, error: Exception) -> TraceError | None:
        """A clear error for one by which a step fails in eager execution because NumPy cannot read a tensor."""
        return None

    def create_variables(self, fn: Callable[[], Any]) -> None:
        """Runs `fn()`, which builds the layers that it calls; no value changes.

        It runs on shapes alone, or on values if it needs them and no trace is open.
        """
        done = False
        with contextlib.nullcontext() if self._in_trace.get() else contextlib.suppress(Exception):
            self._run_on_shapes(fn)
            done = True
        if not done:
            with self.in_steps, Scope(creates=True):
                fn()

    @contextlib.contextmanager
    def outside_of_traces(self) -> Iterator[None]:
        """A block in which variables are created and assigned at once, although a step is being traced."""
        with self.outside(), outside_of_scopes():
            yield

    @abc.abstractmethod
    def _run_on_shapes(self, fn: Callable[[], Any]) -> None:
        """Runs `fn()` on shapes alone; no value changes."""

    def step_of(self, model: keras.Model, name: str, build: Callable[[keras.Model, Any], None]) -> Callable[..., Any]:
        """A step of a model, which takes a batch; a step in Keras's own manner on this backend becomes one.

        Args:
            model: The model.
            name: `"train_step"`, `"test_step"` or `"predict_step"`.
            build: Takes the model and a batch; creates everything that such a step expects to be there.

        Raises:
            StepError: The step is in Keras's own manner on another backend, or takes no batch.
        """
        step: Callable[..., Any] = getattr(model, name)
        check_takes_data(step, type(model).__name__, self.title)
        return step

    # ---------------------------------------------------------- differentiating

    def value_and_grad(
        self, fn: Callable[..., tuple[Tensor, list[Tensor]]], tensors: Tensors, variables: Variables
    ) -> tuple[Tensor, list[Tensor], Gradients, Gradients]:
        """Runs `fn(*tensors)` once and differentiates its value.

        Args:
            fn: Returns a scalar floating-point tensor and a list of further tensors. Its updates of variables happen
                exactly once.
            tensors: Floating-point tensors to differentiate with respect to; `fn` receives others with their values.
            variables: Distinct variables to differentiate with respect to, at their present values.

        Returns:
            The value; the further tensors; the gradients for `tensors`; the gradients for `variables`. A gradient has
            the shape and dtype of its source. It is `None` if the source does not reach the value through
            differentiable operations. The gradient of an embedding may be sparse; `dense` converts it to a tensor.
            Inside another differentiated function, everything stays differentiable.
        """

        def listed(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            value, aux = fn(*tensors)
            return [value], aux

        with naming_what_has_no_derivative(self.title), self.in_steps:
            [value], aux, [row] = self._with_zero(listed, tensors, variables, scalar=True)
        return value, aux, *self._split(row, len(tensors))

    def dense(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient as a tensor."""
        return gradient

    def jacobian(
        self, fn: Outputs, tensors: Tensors, variables: Variables
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[Gradients, Gradients]]]:
        """The derivatives of several outputs of any shape.

        Args:
            fn: Returns a list of floating-point tensors, the outputs, and a list of further tensors. Its updates of
                variables happen exactly once.
            tensors: As for `value_and_grad`.
            variables: As for `value_and_grad`.

        Returns:
            The outputs; the further tensors; for each output a pair like the last two results of `value_and_grad`, of
            derivatives of shape `output.shape + source.shape`.
        """
        with naming_what_has_no_derivative(self.title), self.in_steps:
            outputs, aux, rows = self._with_zero(fn, tensors, variables, scalar=False)
        return outputs, aux, [self._split(row, len(tensors)) for row in rows]

    def _with_zero(self, fn: Outputs, tensors: Tensors, variables: Variables, scalar: bool) -> Derivatives:
        """Differentiates `fn` also with respect to a zero, for `term_twice`."""

        def with_zero(zero: Tensor, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            with self._zero.here(zero):
                return fn(*tensors)

        outputs, aux, rows = self._derivatives(with_zero, [keras.ops.zeros(()), *tensors], variables, scalar=scalar)
        return outputs, aux, [row[1:] for row in rows]

    @abc.abstractmethod
    def _derivatives(self, fn: Outputs, tensors: Tensors, variables: Variables, scalar: bool) -> Derivatives:
        """The outputs of `fn`, the further tensors, and for each output its derivatives by tensors, then variables.

        With `scalar` there is one output, a scalar.
        """

    def _split(self, row: Gradients, count: int) -> tuple[Gradients, Gradients]:
        return list(map(self.dense, row[:count])), row[count:]

    def term_twice(self, term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """A term of a loss twice: for a function that may include it, and for the caller to add to the result of that.

        If the function's result depends on the first through differentiable operations, then, while the sum is
        differentiated, `included` is called, and the second has no gradient: the term counts once. This holds for a
        constant too, since a zero is added that the function is differentiated with respect to.
        """
        return self._twice(term + keras.ops.cast(self._zero.get(), term.dtype), included)

    @abc.abstractmethod
    def _twice(self, term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """See `term_twice`, of a term that depends on a source."""

    # ------------------------------------------------------------------ nesting

    @property
    def nested(self) -> bool:
        """Whether the caller runs inside a trace or a differentiated function.

        Compiled functions that are called there become a part of it.
        """
        return self._in_trace.get() or self.depth > 0

    @property
    def depth(self) -> int:
        """The number of differentiated functions that the caller runs inside of, one inside the other."""
        return self._depth.get()

    def _differentiating(self) -> contextlib.AbstractContextManager[None]:
        """A block inside a differentiated function."""
        return self._depth.here(self.depth + 1)

    @property
    def place(self) -> Any:
        """Differs inside another differentiated function, branch or loop: its tensors may not exist outside."""
        return self.depth, self._branch

    @property
    @abc.abstractmethod
    def _branch(self) -> Any:
        """Differs inside another branch or loop."""
