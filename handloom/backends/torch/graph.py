"""Simplifies a traced torch graph and generates straight-line Python code for it.

A traced Keras step contains many constants (the number of elements of a batch, tensors made from Python numbers), and
`torch.fx` spends much of its time in attribute look-ups. This module removes both; the results are bitwise identical.

Internals used: `OpOverload`, the operations of a graph, with its `_schema`, which shows in-place writes and views, and
`_op`, the operator without its Python wrapper.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from handloom.backends.dependencies import Dependencies

aten = torch.ops.aten

# Larger constants are computed in each step: saving an operation is not worth the memory.
_LARGEST_CONSTANT = 1 << 16

_FILLED = {aten.ones_like.default: 1, aten.zeros_like.default: 0}
_VIEWS_OF_THEMSELVES = (aten.detach.default, aten.alias.default)
# Their second argument is a number; with 1, they change nothing.
_NEUTRAL = (aten.mul.Scalar, aten.mul.Tensor, aten.div.Scalar, aten.div.Tensor, aten.pow.Tensor_Scalar)


def tidy(module: fx.GraphModule) -> None:
    """Simplifies a traced graph in place: folds constants, removes neutral operations and unused results."""
    graph = module.graph
    shared = written_in_place(graph)
    constants: dict[fx.Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = getattr(module, node.target)
            # Others are tensors from outside of the step, which may change between two steps.
            is_made_here = all(user.target is aten.lift_fresh_copy.default for user in node.users)
            if isinstance(value, torch.Tensor) and is_made_here and node not in shared:
                constants[node] = value
        elif isinstance(node.target, OpOverload):
            same = _same_as(node, constants, shared)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
            elif node not in shared and (value := _constant_value(node, constants)) is not None:
                constants[_as_attribute(module, node, value)] = value
    _keep_results_apart(graph)
    graph.eliminate_dead_code()
    module.recompile()


_library = torch.library.Library("handloom_marks", "DEF")
_library.define("mark(Tensor value, str name) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("mark", lambda value, _: value.clone(), "CompositeExplicitAutograd")
_library.impl("mark", lambda value, _: torch.empty_like(value), "Meta")
mark = torch.ops.handloom_marks.mark.default


def dependencies(graph: fx.Graph, arguments: Sequence[fx.Node]) -> Dependencies:
    """The dependencies between the marks of a traced graph."""
    return Dependencies(
        [(str(node.args[1]), node) for node in graph.nodes if node.target is mark],
        arguments,
        following=lambda node: node.users,
        is_end=lambda node: node.op == "output" or getattr(getattr(node.target, "_schema", None), "is_mutable", False),
    )


def remove_marks(module: fx.GraphModule) -> None:
    """Removes the marks from a graph."""
    for node in [node for node in module.graph.nodes if node.target is mark]:
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory an operation writes into, directly or through a view."""
    written: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            info = argument.alias_info
            if info is not None and (info.is_write or node in written):
                fx.map_arg(value, written.add)
    return written


def draws_from_generators(module: fx.GraphModule) -> bool:
    """Whether random operations of a graph draw from generators of the user's own."""
    held = (getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr")
    return any(isinstance(value, torch.Generator) for value in held)


def _same_as(node: fx.Node, constants: dict[fx.Node, torch.Tensor], shared: set[fx.Node]) -> fx.Node | None:
    """An earlier node with the same values, if there is one."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in _VIEWS_OF_THEMSELVES:
        return first
    if node in shared or first in shared:
        return None
    same: Any = None
    is_copied_scalar = node.target is aten.clone.default and not node.meta["val"].shape  # Others may change strides.
    if is_copied_scalar or (node.target in _NEUTRAL and node.args[1:] == (1,)):
        same = first
    elif node.target is aten.where.self and first in constants:
        same = _chosen(constants[first], *node.args[1:])
    return same if isinstance(same, fx.Node) and same not in shared and _alike(node, same) else None


def _chosen(condition: torch.Tensor, yes: Any, no: Any) -> Any:
    """The argument that a condition chooses everywhere."""
    if bool(condition.all()):
        return yes
    return None if bool(condition.any()) else no


def _alike(node: fx.Node, other: fx.Node) -> bool:
    values = [each.meta.get("val") for each in (node, other)]
    kinds = [(value.shape, value.dtype, value.device) for value in values if isinstance(value, torch.Tensor)]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def _constant_value(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of a node that is the same in every step; else `None`."""
    like = node.meta.get("val")
    if not isinstance(like, torch.Tensor) or like.numel() > _LARGEST_CONSTANT:
        return None
    if node.target in _FILLED:
        return torch.full(like.shape, _FILLED[node.target], dtype=like.dtype, device=like.device)
    operation = node.target
    if operation._schema.is_mutable or torch.Tag.nondeterministic_seeded in operation.tags:
        return None
    if not all(source in constants for source in node.all_input_nodes):
        return None
    if "empty" in operation._schema.name:  # Each step needs uninitialized memory of its own.
        return None
    arguments = fx.map_arg((node.args, node.kwargs), lambda source: constants[source])
    return operation(*arguments[0], **arguments[1]).clone()


def _as_attribute(module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> fx.Node:
    name = f"_constant_{node.name}"
    module.register_buffer(name, value, persistent=False)
    with module.graph.inserting_before(node):
        attribute = module.graph.get_attr(name)
    attribute.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(attribute)
    module.graph.erase_node(node)
    return attribute


def _keep_results_apart(graph: fx.Graph) -> None:
    """Copies results that are views of variables, arguments or constants."""
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = ([_apart(graph, result) for result in output.args[0]],)


def _apart(graph: fx.Graph, result: Any) -> Any:
    if not isinstance(result, fx.Node) or _origin(result).op not in ("placeholder", "get_attr"):
        return result
    copy = graph.call_function(aten.clone.default, (result,))
    copy.meta["val"] = result.meta["val"]
    return copy


def _origin(node: fx.Node) -> fx.Node:
    """The node whose memory a view shares."""
    while isinstance(node.target, OpOverload) and any(result.alias_info for result in node.target._schema.returns):
        node = node.args[0]
    return node


def generate(module: fx.GraphModule) -> Callable[..., list[torch.Tensor]]:
    """Straight-line Python code for a graph: one call for each operation; values are deleted after their last use."""
    names: dict[fx.Node, str] = {}
    scope: dict[str, Any] = {}
    lines: list[str] = []
    last_uses = _last_uses(module.graph)
    for index, node in enumerate(module.graph.nodes):
        names[node] = f"v{index}"
        if node.op == "get_attr":
            scope[names[node]] = getattr(module, node.target)
        elif node.op == "call_function":
            lines.append(f"{names[node]} = {_call(node, names, scope)}")
        elif node.op == "output":
            lines.append(f"return {_written(list(node.args[0]), names, scope)}")
        dropped = [names[used] for used in last_uses[node] if used.op == "call_function"]
        if dropped and node.op != "output":
            lines.append("del " + ", ".join(dropped))
    parameters = [names[node] for node in module.graph.nodes if node.op == "placeholder"]
    source = f"def step({', '.join(parameters)}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<handloom step>", "exec"), scope)  # Generated above, from the graph alone.
    step: Callable[..., list[torch.Tensor]] = scope["step"]
    return step


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values whose last use it is."""
    uses: dict[fx.Node, list[fx.Node]] = {}
    known: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        uses[node] = [used for used in (node, *node.all_input_nodes) if used not in known]
        known.update(uses[node])
    return uses


def _call(node: fx.Node, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    if node.target is operator.getitem:
        return f"{names[node.args[0]]}[{node.args[1]!r}]"
    target = node.target._op if isinstance(node.target, OpOverload) else node.target
    arguments = [_written(argument, names, scope) for argument in node.args]
    arguments += [f"{name}={_written(argument, names, scope)}" for name, argument in node.kwargs.items()]
    return f"{_named(target, scope)}({', '.join(arguments)})"


def _written(value: Any, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list):
        return f"[{', '.join(_written(item, names, scope) for item in value)}]"
    if isinstance(value, tuple):
        return f"({''.join(_written(item, names, scope) + ', ' for item in value)})"
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    return _named(value, scope)


def _named(value: Any, scope: dict[str, Any]) -> str:
    """A name for an object in the generated code, always the same."""
    name = f"o{id(value)}"
    scope[name] = value
    return name
