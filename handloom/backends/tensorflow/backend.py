"""TensorFlow: a step becomes one concrete function, whose graph captures variables and changes them in place.

Internals used: AutoGraph's `convert`, because `tf.function` would convert Handloom's own code along with the user's;
its conversion rules, its error, and the user's lines that it attaches to errors; `InaccessibleTensorError`;
`tf.__internal__.FuncGraph`, a graph to run a function on shapes; `Variable._value` (see `handloom/_keras.py`) and
`Variable._initialize`, which creates TensorFlow's variable; `_self_...`, the attributes under which TensorFlow tracks
an object.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.autograph.core import config as autograph_config
from tensorflow.python.autograph.impl.api import StagingError, convert
from tensorflow.python.framework.errors_impl import InaccessibleTensorError

from handloom._keras import Gradients, Tensor, Tensors, Variable, keras, stored_value
from handloom._util.patch import Patch
from handloom._util.source_line import Frames, frames_of, is_users
from handloom._util.switch import Switch
from handloom.backends.base import Backend, Derivatives, Outputs
from handloom.backends.building import built_outside
from handloom.backends.program import Seen, Step
from handloom.backends.scope import Scope
from handloom.backends.tensorflow.assigned import assignments_noted, watch
from handloom.backends.tensorflow.gradients import term_twice
from handloom.backends.tensorflow.operators import operators_of_keras
from handloom.backends.tensorflow.program import MARK, TensorFlowProgram
from handloom.backends.trace_errors import leaked, needs_a_value
from handloom.errors import StepError

# Handloom's own code, when called from converted code of the user, runs unconverted.
autograph_config.CONVERSION_RULES = (
    autograph_config.Convert("handloom.recipes"),
    autograph_config.DoNotConvert("handloom"),
    *autograph_config.CONVERSION_RULES,
)


_convert = convert(recursive=True, conversion_ctx=ag_ctx.ControlStatusCtx(status=ag_ctx.Status.ENABLED))


class TensorFlowBackend(Backend):
    name, title, tested = "tensorflow", "TensorFlow", ("2.20", "2.21")
    holds_text = True
    outside = staticmethod(tf.init_scope)
    in_steps = Patch(built_outside(tf.init_scope), *operators_of_keras)
    _by_xla = Switch(False)

    def is_array(self, leaf: Any) -> bool:
        if isinstance(leaf, keras.Variable):
            return False
        if isinstance(leaf, (np.ndarray, np.generic)) or tf.is_tensor(leaf):
            return True
        if isinstance(leaf, tf.distribute.DistributedValues):
            raise StepError(
                f"HL125: A step received a {type(leaf).__name__}, which has a value for each replica of tf.distribute.",
                fix="Pass it through the strategy, strategy.run(step, args=(batch,)), or pass the whole batch.",
            )
        return False

    def is_passed_by_value(self, leaf: Any) -> bool:
        return self.is_array(leaf) and not isinstance(leaf, tf.Variable)

    def to_tensor(self, array: Any) -> Tensor:
        array = _read(array)
        if array.dtype in (np.float64, tf.float64):
            return tf.cast(array, keras.config.floatx())
        return array if tf.is_tensor(array) else tf.constant(array)

    def sparse_tensor(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        return tf.sparse.reorder(tf.SparseTensor(indices, values, shape))

    def signature(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        kind = "" if isinstance(tensor, tf.Tensor) else f"{type(tensor).__name__} "
        return tuple(tensor.shape), kind + tensor.dtype.name

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        return np.asarray(tensor)  # On a CPU this shares memory, which `tensor.numpy()` would copy.

    def result(self, tensor: Tensor) -> Any:
        return tensor if isinstance(tensor, (tf.RaggedTensor, tf.SparseTensor)) else super().result(tensor)

    def joined(self, results: Sequence[Any]) -> Any:
        if isinstance(results[0], tf.SparseTensor):
            return tf.sparse.concat(0, results)
        if isinstance(results[0], tf.RaggedTensor):
            return tf.concat(results, 0)
        sizes = list(zip(*(result.shape for result in results), strict=True))
        differing = [axis for axis, found in enumerate(sizes[1:], 1) if len(set(found)) > 1]
        if not differing:
            return super().joined(results)
        return tf.concat([tf.RaggedTensor.from_tensor(result, ragged_rank=differing[-1]) for result in results], 0)

    def detach(self, tensor: Tensor) -> Tensor:
        return _read(tensor)

    def attributes(self, thing: Any) -> dict[str, Any]:
        return {name: value for name, value in vars(thing).items() if not name.startswith("_self_")}

    def random_state(self) -> dict[str, np.ndarray]:
        return {"tensorflow": tf.random.get_global_generator().state.numpy()}

    def set_random_state(self, state: dict[str, np.ndarray]) -> None:
        if "tensorflow" in state:
            tf.random.get_global_generator().state.assign(state["tensorflow"])

    def seed_random_state(self, seed: int) -> None:
        tf.random.get_global_generator().reset_from_seed(seed)

    def exporting(self, format: str) -> Any:  # noqa: A002
        return self.in_steps

    def _program(self, fn: Step, tensors: Tensors, seen: Seen, kernels: bool) -> TensorFlowProgram:
        try:
            return TensorFlowProgram(fn, tensors, seen, kernels, functools.partial(self._tracing, kernels))
        except (TypeError, NotImplementedError, AttributeError) as error:
            if "symbolic" not in str(error).lower():
                raise
            raise needs_a_value(_users_frames(error)) from error
        except InaccessibleTensorError as error:
            raise leaked(_users_frames(error)) from error
        except StagingError as error:
            raise _as_raised(error) from None

    @contextlib.contextmanager
    def _tracing(self, by_xla: bool) -> Iterator[None]:
        with (
            self._by_xla.here(by_xla),
            self._in_trace.here(True),
            _variables_made_outside_of_graphs,
            _users_functions_inlined,
            _sizes_known,
            self.in_steps,
        ):
            yield

    def compiles_kernels(self, jit_compile: bool | str) -> bool:
        if jit_compile == "auto":  # As in Keras: XLA if there is an accelerator.
            return any(device.device_type != "CPU" for device in tf.config.list_physical_devices())
        return bool(jit_compile)

    def with_control_flow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return _convert(fn) if self._in_trace.get() else fn

    def _mark(self, tensor: Tensor, name: str) -> Tensor:
        return tf.identity(tensor, name=MARK + name.encode().hex())

    def profiled(self, directory: Path) -> Any:
        return tf.profiler.experimental.Profile(str(directory))

    def _run_on_shapes(self, fn: Callable[[], Any]) -> None:
        graph = tf.__internal__.FuncGraph("shapes")
        with self._in_trace.here(True), Scope(creates=True), graph.as_default(), self.in_steps, _sizes_known:
            fn()

    def dense(self, gradient: Tensor | None) -> Tensor | None:
        return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient

    def _derivatives(self, fn: Outputs, tensors: Tensors, variables: Sequence[Variable], scalar: bool) -> Derivatives:
        _check_on_one_device(variables)
        # Only uses as the argument are differentiated, not other uses of the same tensor in the function.
        copies = [tf.identity(tensor) for tensor in tensors]
        tape = tf.GradientTape(persistent=not scalar, watch_accessed_variables=False)
        with self._differentiating(), assignments_noted(), tape:
            tape.watch(copies)
            sources = [*copies, *(watch(tape, stored_value(variable)) for variable in variables)]
            outputs, aux = (list(map(_read, found)) for found in fn(*copies))
        if not scalar:
            return outputs, aux, [_row(tape, output, sources) for output in outputs]
        # An enclosing differentiated function needs tensors, and XLA needs shapes that do not depend on values.
        change = self.dense if self.depth or self._by_xla.get() else _each_row_once
        return outputs, aux, [list(map(change, tape.gradient(outputs[0], sources)))]

    def _twice(self, term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
        return term_twice(term, included)

    @property
    def _branch(self) -> Any:
        return tf.compat.v1.get_default_graph()


def _check_on_one_device(variables: Sequence[Variable]) -> None:
    """Refuses to differentiate for several replicas of `tf.distribute` at once; for each of them alone is fine."""
    values = [stored_value(variable) for variable in variables]
    mirrored = any(isinstance(value, tf.distribute.DistributedValues) and len(value.values) > 1 for value in values)
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1
    if tf.distribute.in_cross_replica_context() if several else mirrored:
        raise StepError(
            "HL130: A step is differentiated in the scope of a tf.distribute strategy with several replicas, or with "
            "variables from there.",
            "Handloom does not split a step among replicas.",
            "Create and train the model outside of strategy.scope(), on one device; for several devices, use the fit "
            "of a plain keras.Model, or strategy.run(step, args=(batch,)).",
        )


def _read(tensor: Tensor) -> Tensor:
    """The present value of a tensor or variable: on this backend, `keras.Variable.value` is a `tf.Variable`."""
    return tf.identity(tensor) if isinstance(tensor, (tf.Variable, keras.Variable)) else tensor


def _each_row_once(gradient: Any) -> Any:
    """A gradient in which no row is repeated: Keras's optimizers square rows, which is wrong for parts of a sum."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices, places = tf.unique(gradient.indices)
    rows = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(indices))
    return tf.IndexedSlices(rows, indices, gradient.dense_shape)


def _row(tape: tf.GradientTape, output: Tensor, sources: list[Tensor]) -> Gradients:
    """The derivatives of one output with respect to each source."""
    try:
        row: Gradients = tape.jacobian(output, sources)
    except ValueError:  # An operation that has no vectorized form.
        row = tape.jacobian(output, sources, experimental_use_pfor=False)
    return row


def _initialize(original: Callable[[Variable, Any], None]) -> Callable[[Variable, Any], None]:
    def initialize(self: Variable, value: Any) -> None:
        with tf.init_scope() if callable(value) else contextlib.nullcontext():
            original(self, value)

    return initialize


def _length(original: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
    return lambda tensor: tensor.shape[0] if _has_length(tensor) else original(tensor)


def _iterator(original: Callable[[Tensor], Iterator[Tensor]]) -> Callable[[Tensor], Iterator[Tensor]]:
    return lambda tensor: iter(tf.unstack(tensor)) if _has_length(tensor) else original(tensor)


def _has_length(tensor: Tensor) -> bool:
    return bool(tensor.shape.rank) and tensor.shape[0] is not None


_sizes_known = Patch((tf.Tensor, "__len__", _length), (tf.Tensor, "__iter__", _iterator))
"""Inside, `len(x)` and `for row in x` work as on the other backends, also in the `call` of a layer.

AutoGraph does not convert that code; it converts the code of steps, where they work by themselves.
"""

_variables_made_outside_of_graphs = Patch((keras.Variable, "_initialize", _initialize))
"""Variables created inside are initialized at once, and keep their values if the trace fails."""


def _inlined(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        code = getattr(inspect.unwrap(self.python_function), "__code__", None)
        if code is None or not is_users(code.co_filename):
            return original(self, *args, **kwargs)
        return _convert(self.python_function)(*args, **kwargs)

    return call


_users_functions_inlined = Patch((type(tf.function(lambda: None)), "__call__", _inlined))
"""Inside, a user's `tf.function` becomes a part of the trace: its Python code runs each time, and is observed."""


def _users_frames(error: BaseException) -> Frames:
    """The user's lines that led to an error in converted code."""
    converted = getattr(error.__context__, "ag_error_metadata", None)
    if converted is None:
        return frames_of(error)
    return [(frame.filename, frame.lineno) for frame in reversed(converted.translated_stack)]


def _as_raised(error: StagingError) -> BaseException:
    """The original exception, which AutoGraph replaced by one of its own."""
    original: BaseException = error
    while isinstance(original, StagingError) and original.__context__ is not None:  # One for each converted function.
        original = original.__context__
    original.add_note(str(error))  # The traceback shows generated code only; the note shows the line.
    return original


backend = TensorFlowBackend()
