"""`hl.function`: compiled functions and their versions."""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast, overload

from handloom._keras import Tensor, Tensors, Variable, global_seed_generator
from handloom._trace.arguments import Arguments, results
from handloom._trace.draws import Draws
from handloom._trace.eager import runs_eagerly
from handloom._trace.left_out import without_text
from handloom._trace.observe import Observer, VariableUse, observing
from handloom._trace.premises import Premises, PremisesOfFunction
from handloom._trace.signature import (
    Signature,
    as_text,
    differing_in_shapes,
    reason_for,
    shapes_in,
    signature_of,
    static_values,
)
from handloom._trace.slow import runs_when_traced, told_if_slow
from handloom._trace.structure import Structure
from handloom._trace.unused import Forgotten, warn_of_unused
from handloom._util.findings import warn
from handloom._util.listeners import Listeners
from handloom._util.short import short
from handloom.backends import backend
from handloom.backends.dependencies import Dependencies
from handloom.backends.program import Fused, Program, Untraceable
from handloom.distribute._strategy import current
from handloom.errors import ArgumentError, FallbackWarning, RetraceWarning, VariableError

Key: TypeAlias = Any
"""Distinguishes the versions of a function: structure, shapes and dtypes, static values."""

_MANY_VALUES, _MANY_SHAPES = 6, 10

# Tracing changes some of torch's own classes for all threads.
_ONE_TRACE_AT_A_TIME = threading.RLock()

traced = Listeners()
"""Functions that are called with the name of a compiled function and the trace of each new version."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """One compiled version of a function.

    Attributes:
        signature: The arguments that it accepts, as text: `x: float32[32,8], training=True`.
        seconds: Duration of tracing and compiling, in seconds.
        reason: Why it was compiled: how its signature differs from the most similar version.
        compiled: `False` if this version falls back to eager execution; `reason` then says why.
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

    Tracing finds the variables. Tensors and arrays among the arguments are data: a new shape or dtype compiles a new
    version. All other arguments are static: each distinct Python value compiles a new version. The sixth value of one
    argument gives a warning, and so does the tenth version that differs in shapes only. Only the first call may create
    variables. Inside another compiled or differentiated function, the function becomes a part of that.

    Args:
        python_function: The function or method. It takes and returns tensors in any nested structure. Numbers that it
            returns become tensors; other objects are returned as they are.
        jit_compile: `True` to use the backend's kernel compiler (XLA on JAX and TensorFlow, Inductor on PyTorch);
            `False` not to (JAX has no other compiler, so the function then runs eagerly); `"auto"` for XLA on JAX and,
            with an accelerator, on TensorFlow, and a plain graph otherwise.

    Returns:
        A `Function`. Its `python_function` is the original, its `traces` list the compiled versions.

    Raises:
        TraceError: At a call, if Python control flow needs the value of a tensor (on TensorFlow, plain `if`, `for`
            and `while` over tensors are compiled).
        VariableError: At a call, if variables are created after the first call or on every call.
    """
    check_jit_compile(jit_compile)
    if python_function is None:
        return functools.partial(Function, jit_compile=jit_compile, tells_of_unused=True)
    return Function(python_function, jit_compile=jit_compile, tells_of_unused=True)


def check_jit_compile(jit_compile: bool | str) -> None:
    if jit_compile not in (True, False, "auto"):
        raise ArgumentError(f'HL014: jit_compile takes True, False or "auto"; received {short(jit_compile)}.')


class Function:
    """A function and its compiled versions; made by `hl.function`.

    Attributes:
        python_function: The original.
        traces: One `Trace` for each compiled version, oldest first.
        jit_compile: As given to `hl.function`.
        tells_of_unused: Whether it warns of penalties and masks that it does not use; the steps of loops do so apart.
    """

    def __init__(
        self, python_function: Callable[..., Any], *, jit_compile: bool | str = "auto", tells_of_unused: bool = False
    ) -> None:
        if not callable(python_function):
            raise ArgumentError(f"HL015: hl.function compiles a function; received {short(python_function)}.")
        functools.update_wrapper(self, python_function, updated=())
        self.__name__ = getattr(python_function, "__name__", type(python_function).__name__)
        self.python_function = python_function
        self.traces: list[Trace] = []
        self.jit_compile = jit_compile
        self.tells_of_unused = tells_of_unused
        self._versions: dict[Key, list[Version]] = {}
        self._by_raw_key: dict[Key, Version] = {}
        self._signatures: list[Signature] = []
        self._said: set[str] = set()
        self._premises = PremisesOfFunction(self.__name__, python_function, self.is_news)
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
        # Under a name that includes the id: `super().step` and `step` are two functions with the same name. Not by
        # `setattr`: Keras layers track everything that is set on them.
        bound = instance.__dict__.get(self._kept_as)
        # The function of a copied instance is bound to the original.
        if bound is None or getattr(bound.python_function, "__self__", instance) is not instance:
            bound = self._like_this(self.python_function.__get__(instance, owner))
            bound._definition = self  # Keeps it alive, so that no other function gets its id.
            instance.__dict__[self._kept_as] = bound
        return cast("Function", bound)

    def __reduce__(self) -> Any:
        """Copies and pickles without the versions, which belong to the process and the instance."""
        return self._like_this, (self.python_function,)

    @property
    def _like_this(self) -> Callable[[Callable[..., Any]], Function]:
        return functools.partial(Function, jit_compile=self.jit_compile, tells_of_unused=self.tells_of_unused)

    @property
    def touched(self) -> list[Variable]:
        """The variables that the compiled versions read or assign."""
        return _distinct(version.use.touched for version in self._all())

    @property
    def assigned(self) -> list[Variable]:
        """The variables that they assign, without those that an optimizer updates in place on some backends."""
        return _distinct(version.use.written for version in self._all())

    @property
    def unsaved(self) -> list[str]:
        """The state that they use apart from Keras variables, in words."""
        return list(dict.fromkeys(text for version in self._all() for text in version.unsaved))

    def _all(self) -> list[Version]:
        return [version for versions in self._versions.values() for version in versions]

    def resolve(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[Version, Tensors]:
        """The version for these arguments, compiled if it is new, and the tensors among them."""
        # The fast path of a training loop with a few arrays: no flattening, no conversions.
        leaves = args[0] if len(args) == 1 and type(args[0]) is tuple else args
        try:
            key = (runs_eagerly(), current(), leaves is args, *map(backend.key, leaves))
        except AttributeError:
            key = None
        version = None if kwargs else self._by_raw_key.get(key)
        if version is not None and version.holds():
            return version, leaves
        version, tensors = self._resolve_any(args, kwargs or {})
        if key is not None and not kwargs and len(tensors) == len(leaves) and all(map(operator.is_, tensors, leaves)):
            self._by_raw_key[key] = version
        return version, tensors

    def _resolve_any(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Version, Tensors]:
        args, kwargs = without_text((tuple(args), kwargs))
        arguments = Arguments(args, kwargs)
        key = (runs_eagerly(), current(), *arguments.key)
        try:
            version = self._valid(key)
        except TypeError as error:
            raise ArgumentError(
                f"HL016: An argument of {self.__name__} is neither data nor hashable: {error}.",
                "A compiled function distinguishes its static arguments by their values.",
                "Pass tensors, arrays, numbers, strings, or structures of these.",
            ) from error
        if version is None:
            with _ONE_TRACE_AT_A_TIME:
                version = self._valid(key)
                if version is None:
                    version = self._new_version(key, arguments, args, kwargs)
                    self._versions.setdefault(key, []).append(version)
        return version, arguments.tensors

    def _valid(self, key: Key) -> Version | None:
        """The version for a key whose premises hold."""
        return next((version for version in self._versions.get(key, ()) if version.holds()), None)

    def _new_version(self, key: Key, arguments: Arguments, args: Sequence[Any], kwargs: dict[str, Any]) -> Version:
        version = Version(self, arguments)
        if runs_eagerly():
            return version
        signature = version.signature = signature_of(self.python_function, args, kwargs)
        reason, started = reason_for(signature, self._signatures), time.perf_counter()
        state = self._premises.state(arguments.objects)
        changed = self._versions[key][-1].premises.changed if self._versions.get(key) else []
        if changed:
            reason = self._premises.reason(changed, state)
        draws = Draws(state)
        try:
            with draws.noticed(), told_if_slow(self.__name__):
                version.compile(self.jit_compile, first=not self.traces)
        except Untraceable as error:
            version.fallback_reason, version.unsaved = str(error), error.unsaved
        finally:
            before, state = state, self._premises.state(arguments.objects)
            self._premises.note_changes(before, state)
        if not version.compiled:
            no_other = f"jit_compile=False, and {backend.title} has no other compiler"
            reason = f"eager: {version.fallback_reason or no_other}"
        seconds = time.perf_counter() - started
        version.trace = Trace(as_text(signature), seconds, reason, compiled=version.compiled)
        self.traces.append(version.trace)
        traced.tell(self.__name__, version.trace)
        if not changed:
            self._signatures.append(signature)
            self._warn_of_many_values(signature)
        if version.compiled:
            version.set_premises(self._premises.of_version(state))
            self._warn_of(version, draws)
        return version

    def _warn_of(self, version: Version, draws: Draws) -> None:
        """Warns of what is wrong with a compiled version."""
        if any(version.signature is last for last in self._signatures[-1:]):
            self._warn_of_many_shapes(version.signature)
        if self.tells_of_unused:
            for text in filter(self.is_news, version.forgotten.found(version.dependencies, self.python_function)):
                warn_of_unused(self.__name__, text)
        if sources := list(filter(self.is_news, draws.sources)):
            warn(
                f"HL108: {self.__name__} drew numbers from {' and '.join(sources)} while it was compiled.",
                "They are constants of the compiled function now, the same in each step.",
                "Use keras.random, or draw outside of the function and pass an array.",
            )

    def forget(self, version: Version) -> None:
        """Removes a version, which is compiled again when it is needed."""
        for versions in self._versions.values():
            versions[:] = [other for other in versions if other is not version]
        self._by_raw_key = {key: other for key, other in self._by_raw_key.items() if other is not version}
        self._signatures = [other for other in self._signatures if other is not version.signature]
        self.traces[:] = [other for other in self.traces if other is not version.trace]

    def is_news(self, text: str) -> bool:
        """Whether this is the first call with that text: a warning is given once."""
        known = text in self._said
        self._said.add(text)
        return not known

    def _warn_of_many_values(self, signature: Signature) -> None:
        for name, description in signature.items():
            is_new = all(old.get(name) != description for old in self._signatures[:-1])
            values = static_values(name, self._signatures)
            if is_new and description.startswith("=") and len(values) == _MANY_VALUES:
                warn(
                    f"HL110: {self.__name__} has been compiled for {_MANY_VALUES} values of the argument {name!r}: "
                    f"{', '.join(values)}.",
                    "Python values are static: each new value compiles the function again.",
                    "If the value changes from call to call, pass it as an array, for example "
                    f"np.float32({name}), or keep it in a keras.Variable.",
                    category=RetraceWarning,
                )

    def _warn_of_many_shapes(self, signature: Signature) -> None:
        alike = differing_in_shapes(signature, self._signatures)
        if len(alike) == _MANY_SHAPES and shapes_in(alike):
            shapes = "; ".join(f"{name}: {', '.join(found)}" for name, found in shapes_in(alike).items())
            warn(
                f"HL129: {self.__name__} has been compiled for {_MANY_SHAPES} shapes of its arguments: {shapes}.",
                "Each new shape compiles the function again.",
                "Use few shapes: pad sequences to one length or a few (keras.utils.pad_sequences, buckets), and drop a "
                "smaller last batch (hl.Feed(..., drop_remainder=True)).",
                category=RetraceWarning,
            )


def _distinct(found: Iterable[dict[int, Variable]]) -> list[Variable]:
    return list({key: variable for variables in found for key, variable in variables.items()}.values())


class Version:
    """One version of a function, for one structure, one set of shapes and dtypes, one set of static values.

    Attributes:
        compiled: Whether it is compiled; otherwise it runs eagerly.
        dependencies: The dependencies in its program; see `Backend.marked`.
        forgotten: What the function forgets.
        premises: The Python values that it holds as constants.
        holds: Tells whether they are still the same.
        unsaved: The state in its program that no checkpoint holds, in words.
        run: Runs it.
        use: The variables that it reads and assigns.
    """

    def __init__(self, function: Function, arguments: Arguments) -> None:
        self._function = function
        self._arguments = arguments
        self._results: Structure | None = None
        self.compiled = False
        self.fallback_reason = ""
        self.dependencies = Dependencies()
        self.unsaved: Sequence[str] = ()
        self.signature: Signature = {}
        self.trace: Trace | None = None
        self._program: Program | None = None
        self._fused: dict[int, Fused | None] = {}
        self.use = VariableUse()
        self.forgotten = Forgotten()
        self.set_premises(Premises())
        self.run: Callable[[Tensors], Tensors] = self._run_eagerly

    def set_premises(self, premises: Premises) -> None:
        self.premises, self.holds = premises, premises.hold

    def compile(self, jit_compile: bool | str, *, first: bool) -> None:
        """Compiles it, if the backend can."""
        global_seed_generator()  # Must exist before the function is traced.
        flat, tensors = self._flat(first), self._arguments.tensors
        program = backend.trace(flat, tensors, jit_compile=jit_compile, seen=self.use.known)
        if program is not None:
            self._program, self.compiled = program, True
            self.run = self._run_and_compile if program.compiles_in_first_run else program.__call__
            self.dependencies, self.unsaved = program.dependencies, program.unsaved

    def _run_and_compile(self, tensors: Tensors) -> Tensors:
        assert self._program is not None
        with told_if_slow(self._function.__name__):
            found = self._program(tensors)
        self.run = self._program.__call__
        return found

    def fused(self, steps: int) -> Fused | None:
        """A program that runs this version so many times in one dispatch; `None` if the backend has none."""
        if steps not in self._fused:
            with _ONE_TRACE_AT_A_TIME, told_if_slow(self._function.__name__):
                self._fused[steps] = self._compile_fused(steps)
        return self._fused[steps]

    def _compile_fused(self, steps: int) -> Fused | None:
        try:
            return self._program.fused(steps) if self._program is not None else None
        except Untraceable as error:
            if self._function.is_news(f"{steps} {error}"):
                warn(
                    f"HL123: {steps} steps of {self._function.__name__} cannot run in one dispatch: {error}.",
                    "They run one by one, with the same results (slower).",
                    category=FallbackWarning,
                )
            return None

    def _flat(self, first: bool) -> Callable[..., list[Tensor]]:
        """The function from the tensors among its arguments to the tensors among its results."""
        runs = 0

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal runs
            python_function = backend.with_control_flow(self._function.python_function)
            made = len(self.use.made)
            observers: list[Observer] = [self.use]
            if self._function.tells_of_unused:
                python_function = self.forgotten.marking(self._function.python_function, python_function)
                observers += self.forgotten.observers
            with observing(*observers):
                try:
                    found = results(self._arguments.call(python_function, tensors))
                finally:
                    if len(self.use.made) > made and not (first and runs == 0):
                        raise _created_late(self._function.__name__, self.use.made[made:], first)
            if not self.compiled:  # A fused program traces the function once more.
                self._results = found
            runs += 1  # Only now: after a failure, a backend may trace the function again in another way.
            return found.tensors

        runs_when_traced(flat)
        return flat

    @property
    def static(self) -> list[Any]:
        """The leaves of its results, with `None` for tensors; known once it is compiled."""
        assert self._results is not None
        return self._results.rest

    def rebuild(self, tensors: Tensors) -> Any:
        """The results of the function, from the tensors that `run` returned."""
        assert self._results is not None
        return self._results.filled(tensors)

    def _run_eagerly(self, tensors: Tensors) -> list[Tensor]:
        try:
            with backend.in_steps:
                result = self._arguments.call(backend.with_control_flow(self._function.python_function), tensors)
        except Exception as error:
            if self.fallback_reason:  # This error may be the reason why it could not be compiled.
                self._function.forget(self)
            if clear := backend.unreadable(error):
                raise clear from error
            raise
        if self.fallback_reason and self._function.is_news(self.fallback_reason):
            warn(
                f"HL109: {self._function.__name__} could not be compiled and falls back to eager execution (slower): "
                f"{self.fallback_reason}.",
                category=FallbackWarning,
            )
        self._results = results(result)
        return [backend.detach(tensor) for tensor in self._results.tensors]


def _created_late(name: str, created: list[Any], first: bool) -> VariableError:
    when = "on every call" if first else "after its first call"
    return VariableError(
        f"HL111: {name} creates variables {when}: {', '.join(variable.path for variable in created)}.",
        "A compiled function must use the same variables in each call.",
        "Create them once, outside of the function: layers, metrics, optimizers and seed generators before the first "
        "call, or under `if self.layer is None:`.",
    )
