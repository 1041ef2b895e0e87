"""TensorFlow: what its converter to ONNX leaves as TensorFlow has it."""

from __future__ import annotations

from typing import Any


def refuse_lost_constants(graph: Any) -> None:
    """Refuses what the converter took constants of, that a layer keeps as tensors, for inputs: their values are lost.

    Args:
        graph: An `onnx.GraphProto`.

    Raises:
        NotImplementedError: Names them.
    """
    constants = [node.name for node in graph.input if ":" in node.name]
    if constants:
        raise NotImplementedError(f"the converter does not keep the constants of layers ({', '.join(constants)})")


def say_erfc_by_erf(graph: Any) -> bool:
    """Writes Erfc, of which TensorFlow's GELU is made, as 1 - Erf, which ONNX has; whether there was any.

    Args:
        graph: An `onnx.GraphProto`, changed in place.
    """
    from onnx.helper import make_node, make_tensor  # noqa: PLC0415  Slow, and not needed to train.

    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type != "Erfc":
            nodes.append(node)
            continue
        [x], [result], name = node.input, node.output, node.name
        one = make_tensor(f"{name}/one", data_type=1, dims=(), vals=[1.0])
        nodes += [
            make_node("Erf", [x], [f"{name}/erf"], f"{name}/Erf"),
            make_node("Constant", [], [f"{name}/float_one"], f"{name}/Constant", value=one),
            make_node("CastLike", [f"{name}/float_one", x], [f"{name}/one"], f"{name}/CastLike"),
            make_node("Sub", [f"{name}/one", f"{name}/erf"], [result], f"{name}/Sub"),
        ]
    changed = len(nodes) > len(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed
