"""TensorFlow: a step as one concrete function, which reads and changes variables in place.

Internals used: `get_read_only_resource_input_indices_graph`, which finds the variables that a graph only reads, also in
branches, loops and functions.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.auto_control_deps_utils import get_read_only_resource_input_indices_graph

from handloom._keras import Tensor, Tensors, Variable, stored_value
from handloom._util.source_line import Frames
from handloom.backends.dependencies import Dependencies
from handloom.backends.program import Fused, Program, Seen, Step, Tracing, Untraceable
from handloom.backends.trace_errors import leaked

MARK = "handloom_mark_"


# Their random numbers depend on how often they have run in this process.
_RANDOM = re.compile(r"Random(Uniform|UniformInt|StandardNormal|Shuffle|Gamma|PoissonV2)|Multinomial|.*TruncatedNormal")


class TensorFlowProgram(Program):
    """A step, traced.

    Args:
        fn: The step.
        tensors: One set of arguments.
        seen: The Keras variables that the step uses, by id; filled while it is traced.
        kernels: Whether XLA compiles it.
        tracing: Makes the context in which the step is traced.
    """

    def __init__(self, fn: Step, tensors: Tensors, seen: Seen, kernels: bool, tracing: Tracing) -> None:
        self._fn, self._tensors, self._kernels, self._tracing = fn, tensors, kernels, tracing
        self.compiles_in_first_run = kernels
        specs = [tf.type_spec_from_value(tensor) for tensor in tensors]
        self._concrete = self._traced(lambda *tensors: list(fn(*tensors)), specs)
        graph = self._concrete.graph
        foreign = [inner for outer, inner in graph.captures if tf.is_symbolic_tensor(outer)]
        if foreign:
            raise leaked(_frames_of_first_use(foreign[0]))
        variables = {id(stored_value(variable)): variable for variable in seen.values()}
        unchanged = get_read_only_resource_input_indices_graph(graph)
        handles = {id(graph.inputs[index]) for index in unchanged}
        known = [(variables[id(held)], inner) for held, inner in _captured(graph) if id(held) in variables]
        self.read = tuple(variable for variable, inner in known if id(inner) in handles)
        self.written = tuple(variable for variable, inner in known if id(inner) not in handles)
        self.dependencies = _dependencies(graph, len(self._concrete.captured_inputs))
        self.unsaved = [*_own_variables(graph, variables), *_own_randomness(graph)]

    def _traced(self, fn: Callable[..., list[Tensor]], specs: Sequence[tf.TypeSpec]) -> Any:
        function = tf.function(fn, autograph=False, jit_compile=self._kernels)
        with self._tracing():
            return function.get_concrete_function(*specs)

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        results: list[Tensor] = self._concrete(*tensors)
        return results

    def pure(self, written: Tensors, read: Tensors, tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        stored = [stored_value(variable) for variable in (*self.written, *self.read)]
        # Other variables replace those that the function has captured.
        pairs = zip(stored, [*written, *read], strict=True)
        copies = [tf.Variable(value, dtype=variable.dtype, trainable=False) for variable, value in pairs]
        handles = {id(variable.handle): copy.handle for variable, copy in zip(stored, copies, strict=True)}
        captured = [handles.get(id(handle), handle) for handle in self._concrete.captured_inputs]
        flat = tf.nest.flatten(list(tensors), expand_composites=True)
        dtypes = [output.dtype for output in self._concrete.graph.outputs]
        results = tf.raw_ops.StatefulPartitionedCall(args=[*flat, *captured], Tout=dtypes, f=self._concrete)
        packed = tf.nest.pack_sequence_as(self._concrete.structured_outputs, results, expand_composites=True)
        return list(map(tf.identity, copies[: len(written)])), list(packed)

    def fused(self, steps: int) -> Fused:
        if not all(isinstance(tensor, tf.Tensor) for tensor in self._tensors):
            raise Untraceable("sparse and ragged batches have no common shape")

        def run_all(*stacked: Tensor) -> list[Tensor]:
            def step(index: Any) -> list[Tensor]:
                return list(self._fn(*(tensor[index] for tensor in stacked)))

            def advance(index: Tensor) -> Tensor:
                step(index)
                return index + 1

            tf.while_loop(lambda index: index < steps - 1, advance, [0], parallel_iterations=1)
            return step(-1)

        specs = [tf.TensorSpec((steps, *tensor.shape), tensor.dtype) for tensor in self._tensors]
        run = self._traced(run_all, specs)
        return lambda batches: run(*map(tf.stack, zip(*batches, strict=True)))


def _frames_of_first_use(tensor: Any) -> Frames:
    """The lines that led to the first operation on a tensor of a graph, the outermost first."""
    uses = tensor.consumers()
    return [(frame.filename, frame.lineno) for frame in uses[0].traceback] if uses else ()


def _captured(graph: Any) -> Iterator[tuple[tf.Variable, Tensor]]:
    """The captured variables of a graph, each with its handle in the graph."""
    held = {id(variable.handle): variable for variable in graph.variables}
    for outer, inner in graph.captures:
        if id(outer) in held:
            yield held[id(outer)], inner


def _own_variables(graph: Any, known: Mapping[int, Variable]) -> Iterator[str]:
    """The variables of TensorFlow in a graph that belong to no Keras variable."""
    saved = [tf.random.get_global_generator().state]  # See `TensorFlowBackend.random_state`.
    for variable in graph.variables:
        if id(variable) not in known and not any(variable is other for other in saved):
            yield f"the tf.Variable {variable.name!r}"


def _own_randomness(graph: Any) -> Iterator[str]:
    """The random operations in a graph whose state is inside TensorFlow."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    for kind in sorted({node.op for node in nodes if _RANDOM.fullmatch(node.op)}):
        yield f"tf.random (the operation {kind})"


def _dependencies(graph: Any, captured: int) -> Dependencies:
    results = {tensor.op for tensor in graph.outputs}
    arguments = graph.inputs[: len(graph.inputs) - captured]
    return Dependencies(
        _marks(graph),
        [argument.op for argument in arguments],
        following=lambda node: [user for output in node.outputs for user in output.consumers()],
        is_end=lambda node: node in results or node.op_def.is_stateful,
    )


def _marks(graph: Any) -> Iterator[tuple[str, tf.Operation]]:
    for operation in graph.get_operations():
        code = operation.name.rpartition("/")[2]
        if operation.type == "Identity" and code.startswith(MARK):
            # TensorFlow appends numbers to repeated names.
            yield bytes.fromhex(code.removeprefix(MARK).partition("_")[0]).decode(), operation
