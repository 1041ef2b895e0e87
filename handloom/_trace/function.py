"""Compiled functions: which versions there are, and why."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast, overload

import numpy as np
import optree

from handloom._keras import Tensor, Variable, global_seed_generator
from handloom._trace.arguments import Arguments, Outputs
from handloom._trace.eager import runs_eagerly
from handloom._trace.observe import VariableUse, observing
from handloom._util.findings import warn
from handloom._util.listeners import Listeners
from handloom.backends import backend
from handloom.backends.dependencies import Dependencies
from handloom.backends.program import Fused, Program, Untraceable
from handloom.errors import ArgumentError, FallbackWarning, RetraceWarning, VariableError

Key: TypeAlias = Any
"""What tells two versions of a function apart: structure, shapes and dtypes, static values."""

_MANY_VALUES = 6

# Tracing changes some of torch's own classes for all threads.
_ONE_TRACE_AT_A_TIME = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Trace:
    """One compiled version of a function.

    Attributes:
        signature: The arguments it is for, as text: `x: float32[32,8], training=True`.
        seconds: How long tracing and compiling took, in seconds.
        reason: Why it was made: what differs from the version most like it.
        compiled: False if this version runs op by op; the reason then says why.
    """

    signature: str
    seconds: float
    reason: str
    compiled: bool = True


@overload
def function(python_function: Callable[..., Any], /) -> Function: ...
@overload
def function(*, jit_compile: bool | str = "auto") -> Callable[[Callable[..., Any]], Function]: ...


def function(
    python_function: Callable[..., Any] | None = None, /, *, jit_compile: bool | str = "auto"
) -> Function | Callable[[Callable[..., Any]], Function]:
    """Compiles a function that may read and write any Keras variables: layers, optimizers, metrics, seeds.

    Its state is found by tracing. Tensors and arrays among its arguments are data: a new shape or dtype makes a new
    version. Everything else is static: each distinct Python value makes a new version, and the sixth of one argument
    warns. Variables may be created in the first call only. Inside another compiled or differentiated function it
    becomes part of that.

    Args:
        python_function: The function, or a method. It takes and returns tensors, in any nested structure; numbers it
            returns become tensors, other objects are returned as they are.
        jit_compile: `True` to use the backend's kernel compiler (XLA on JAX and TensorFlow, Inductor on PyTorch);
            `False` to do without (on JAX, which has nothing else, the function then runs op by op); `"auto"` for XLA
            on JAX and, with an accelerator, on TensorFlow, and a plain graph otherwise.

    Returns:
        A `Function`. Its `python_function` is the original, its `traces` list the compiled versions.

    Raises:
        TraceError: At a call, if Python control flow needs the value of a tensor (on TensorFlow plain `if`, `for`
            and `while` over tensors are compiled).
        VariableError: At a call, if variables are created after the first call, or anew on every call.
    """
    check_jit_compile(jit_compile)
    if python_function is None:
        return functools.partial(Function, jit_compile=jit_compile)
    return Function(python_function, jit_compile=jit_compile)


def check_jit_compile(jit_compile: bool | str) -> None:
    if jit_compile not in (True, False, "auto"):
        raise ArgumentError(f'HL014: jit_compile takes True, False or "auto"; received {jit_compile!r}.')


class Function:
    """A function and its compiled versions; made by `hl.function`.

    Attributes:
        python_function: The original.
        traces: One `Trace` for each compiled version, oldest first.
        jit_compile: As given to `hl.function`.
    """

    def __init__(self, python_function: Callable[..., Any], *, jit_compile: bool | str = "auto") -> None:
        if not callable(python_function):
            raise ArgumentError(f"HL015: hl.function compiles a function; received {python_function!r}.")
        functools.update_wrapper(self, python_function, updated=())
        self.__name__ = getattr(python_function, "__name__", type(python_function).__name__)
        self.python_function = python_function
        self.traces: list[Trace] = []
        self.jit_compile = jit_compile
        self._versions: dict[Key, Version] = {}
        self._by_raw_key: dict[Key, Version] = {}
        self._signatures: list[dict[str, str]] = []
        self._reasons_said: set[tuple[str, str]] = set()
        self._kept_as = f"_compiled_{self.__name__}_{id(self):x}"
        self._definition: Function | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if backend.nested:
            return backend.with_control_flow(self.python_function)(*args, **kwargs)
        version, tensors = self.resolve(args, kwargs)
        return version.rebuild(version.run(tensors))

    def __get__(self, instance: Any, owner: type) -> Function:
        if instance is None or not hasattr(self.python_function, "__get__"):
            return self
        # Kept under a name of its own: `super().step` and `step` are two functions, one of them not under its own name.
        # Not by `setattr`: Keras layers look at everything that is set on them.
        bound = instance.__dict__.get(self._kept_as)
        # A copied instance brings the functions of the other.
        if bound is None or getattr(bound.python_function, "__self__", instance) is not instance:
            bound = Function(self.python_function.__get__(instance, owner), jit_compile=self.jit_compile)
            bound._definition = self  # Alive, it is the only one of its name.
            instance.__dict__[self._kept_as] = bound
        return cast("Function", bound)

    def __reduce__(self) -> Any:
        """Copied, and pickled, without its versions, which stay with the process and the instance they are for."""
        return functools.partial(Function, jit_compile=self.jit_compile), (self.python_function,)

    @property
    def touched(self) -> list[Variable]:
        """The variables that the compiled versions read or assign."""
        return _distinct(version.touched for version in self._versions.values())

    @property
    def assigned(self) -> list[Variable]:
        """Those that they assign; not what an optimizer updates in place, which on some backends it does."""
        return _distinct(version.assigned for version in self._versions.values())

    def resolve(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[Version, Sequence[Tensor]]:
        """The version for these arguments, compiled if need be, and the tensors among them."""
        # The path of a training loop, a few arrays: no walk through structure, no look at what needs converting.
        leaves = args[0] if len(args) == 1 and type(args[0]) is tuple else args
        try:
            key = (runs_eagerly(), leaves is args, *map(backend.key, leaves))
        except AttributeError:
            key = None
        version = None if kwargs else self._by_raw_key.get(key)
        if version is not None:
            return version, leaves
        version, tensors = self._general(args, kwargs or {})
        if key is not None and not kwargs and len(tensors) == len(leaves) and all(map(operator.is_, tensors, leaves)):
            self._by_raw_key[key] = version
        return version, tensors

    def _general(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Version, Sequence[Tensor]]:
        arguments = Arguments(*optree.tree_flatten((tuple(args), kwargs)))
        key = (runs_eagerly(), *arguments.key)
        try:
            version = self._versions.get(key)
        except TypeError as error:
            raise ArgumentError(
                f"HL016: {self.__name__} was given an argument that is neither data nor hashable, and so cannot be told from "
                f"others: {error}. Pass tensors, arrays, numbers, strings, or structures of these.",
            ) from error
        if version is None:
            with _ONE_TRACE_AT_A_TIME:
                version = self._versions.get(key) or self._new_version(arguments, args, kwargs)
                self._versions[key] = version
        return version, arguments.tensors

    def _new_version(self, arguments: Arguments, args: Sequence[Any], kwargs: dict[str, Any]) -> Version:
        version = Version(self, arguments)
        if runs_eagerly():
            return version
        signature = version.signature = _described(self.python_function, args, kwargs)
        reason, started = self._reason(signature), time.perf_counter()
        drawn = _numpys_draws()
        try:
            version.compile(self.jit_compile, first=not self.traces)
        except Untraceable as error:
            version.fallback_reason = str(error)
            reason = f"op by op: {error}"
        else:
            reason = reason if version.compiled else "op by op: jit_compile=False leaves nothing else"
        text = ", ".join(f"{name}{description}" for name, description in signature.items())
        self._signatures.append(signature)
        version.trace = Trace(text, time.perf_counter() - started, reason, compiled=version.compiled)
        self.traces.append(version.trace)
        traced.tell(self.__name__, version.trace)
        self._warn_of_many_values(signature)
        if version.compiled and _numpys_draws() != drawn:
            self._warn_of_frozen_draws()
        return version

    def _warn_of_frozen_draws(self) -> None:
        warn(
            f"HL108: {self.__name__} drew from np.random while it was compiled: those numbers are constants now, the same in "
            "each step. Use keras.random, which draws anew each time, or draw outside and pass an array.",
        )

    def forget(self, version: Version) -> None:
        """Has a version made anew when it is next asked for."""
        self._versions = {key: other for key, other in self._versions.items() if other is not version}
        self._by_raw_key = {key: other for key, other in self._by_raw_key.items() if other is not version}
        self._signatures = [other for other in self._signatures if other is not version.signature]
        self.traces[:] = [other for other in self.traces if other is not version.trace]

    def say_once(self, what: str, reason: str) -> None:
        """Warns of a fallback, unless it has been said with that reason."""
        if (what, reason) not in self._reasons_said:
            self._reasons_said.add((what, reason))
            warn(f"HL109: {self.__name__}: {what} ({reason}).", category=FallbackWarning)

    def _reason(self, signature: dict[str, str]) -> str:
        if not self._signatures:
            return "first call"
        fewest: list[str] = min([_differences(old, signature) for old in self._signatures], key=len)
        return "; ".join(fewest) or "another structure or type of the same arguments"

    def _warn_of_many_values(self, signature: dict[str, str]) -> None:
        for name, description in signature.items():
            values = {old[name] for old in self._signatures[:-1] if name in old}
            static = sorted({value[1:] for value in {*values, description} if value.startswith("=")})
            if description not in values and description.startswith("=") and len(static) == _MANY_VALUES:
                warn(
                    f"HL110: {self.__name__} has been compiled for {_MANY_VALUES} values of the argument {name!r}: "
                    f"{', '.join(static)}. "
                    "Python values are static: each new one compiles the function again. If it changes from call to "
                    f"call, pass it as an array, for example np.float32({name}), or keep it in a keras.Variable.",
                    category=RetraceWarning,
                )


traced = Listeners()
"""Those that are told of each version that is compiled: the name of its function, and its trace."""


def _distinct(found: Iterable[dict[int, Variable]]) -> list[Variable]:
    return list({key: variable for variables in found for key, variable in variables.items()}.values())


class Version:
    """One version of a function: for one structure, one set of shapes and dtypes, one set of static values.

    Attributes:
        compiled: Whether it is; else it runs eagerly.
        dependencies: What depends on what in it; see `Backend.marked`.
        run: Runs it.
    """

    def __init__(self, function: Function, arguments: Arguments) -> None:
        self._function = function
        self._arguments = arguments
        self._outputs = Outputs()
        self.compiled = False
        self.fallback_reason = ""
        self.dependencies = Dependencies()
        self.signature: dict[str, str] = {}
        self.trace: Trace | None = None
        self._program: Program | None = None
        self._fused: dict[int, Fused | None] = {}
        self._use = VariableUse()
        self.run: Callable[[Sequence[Tensor]], Sequence[Tensor]] = self._run_eagerly

    def compile(self, jit_compile: bool | str, *, first: bool) -> None:
        """Compiles it, if the backend can."""
        global_seed_generator()  # Creates it, if need be, before the function is traced.
        program = backend.trace(
            self._flat(first), self._arguments.tensors, jit_compile=jit_compile, seen=self._use.known
        )
        if program is not None:
            self.run, self._program, self.compiled = program.__call__, program, True
            self.dependencies = program.dependencies

    def fused(self, steps: int) -> Fused | None:
        """What runs this version so many times in one dispatch; `None` if nothing is gained by that, or nothing can."""
        if steps not in self._fused:
            with _ONE_TRACE_AT_A_TIME:
                self._fused[steps] = self._compile_fused(steps)
        return self._fused[steps]

    def _compile_fused(self, steps: int) -> Fused | None:
        try:
            return self._program.fused(steps) if self._program is not None else None
        except Untraceable as error:
            self._function.say_once(f"{steps} steps cannot be dispatched together and are taken one by one", str(error))
            return None

    def _flat(self, first: bool) -> Callable[..., list[Tensor]]:
        """The function of the tensors among its arguments, to the tensors among its results."""
        runs = 0

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal runs
            outputs = Outputs() if self.compiled else self._outputs  # Once compiled, what it returns is known.
            python_function = backend.with_control_flow(self._function.python_function)
            made = len(self._use.made)
            with observing(self._use):
                try:
                    results = outputs.put(self._arguments.call(python_function, tensors))
                finally:
                    if len(self._use.made) > made and not (first and runs == 0):
                        raise _created_late(self._function.__name__, self._use.made[made:], first)
            runs += 1  # Only now: a backend may try again, in another way, what failed halfway to all variables.
            return results

        return flat

    @property
    def touched(self) -> dict[int, Variable]:
        """The variables that it reads or assigns, by id."""
        return self._use.touched

    @property
    def assigned(self) -> dict[int, Variable]:
        """Those that it assigns; not what an optimizer updates in place."""
        return self._use.written

    @property
    def static(self) -> list[Any]:
        """The leaves of what the function returns, with `None` for the tensors; known once it is compiled."""
        return self._outputs.rest

    def rebuild(self, flat: Sequence[Tensor]) -> Any:
        """What the function returned, from the tensors among it."""
        return self._outputs.get(flat)

    def _run_eagerly(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        try:
            result = self._arguments.call(backend.with_control_flow(self._function.python_function), tensors)
        except Exception:
            if self.fallback_reason:  # Perhaps it could not be compiled because of this very error.
                self._function.forget(self)
            raise
        if self.fallback_reason:
            self._function.say_once(
                "it could not be compiled and falls back to eager execution (slower)", self.fallback_reason
            )
        return [backend.detach(tensor) for tensor in self._outputs.put(result)]


def _numpys_draws() -> tuple[Any, ...]:
    """Where NumPy's global random numbers stand."""
    _, key, position, *rest = np.random.get_state()
    return hash(np.asarray(key).tobytes()), position, *rest


def _created_late(name: str, created: list[Any], first: bool) -> VariableError:
    when = (
        "on every call: it made them twice while it was traced"
        if first
        else "after its first call, when the compiled versions already know all variables"
    )
    names = ", ".join(variable.path for variable in created)
    return VariableError(
        f"HL111: {name} creates variables {when} ({names}). Create them once, outside of the function: layers, metrics, "
        "optimizers and seed generators before the first call, or under `if self.layer is None:`.",
    )


def _described(python_function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, str]:
    """Each leaf of the arguments by name: `{"x": ": float32[32,8]", "training": "=True"}`."""
    try:
        bound = inspect.signature(python_function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # A wrong call, which will say so itself; or no signature at all.
        bound = {f"args[{index}]": argument for index, argument in enumerate(args)} | kwargs
    described = {}
    for name, argument in bound.items():
        paths, leaves, _ = optree.tree_flatten_with_path(argument)
        for path, leaf in zip(paths, leaves, strict=True):
            described[name + "".join(f"[{part!r}]" for part in path)] = _described_leaf(leaf)
    return described


def _described_leaf(leaf: Any) -> str:
    if not backend.is_array(leaf):
        return f"={leaf!r}"
    shape, dtype = backend.signature(backend.to_tensor(leaf))
    return f": {dtype}[{','.join(map(str, shape))}]"


def _differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    changed = [
        f"{name}: {old[name].lstrip(':= ')} -> {new[name].lstrip(':= ')}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    changed += [f"{name}{new[name]} is new" for name in new if name not in old]
    return changed + [f"{name}{old[name]} is gone" for name in old if name not in new]
