"""JAX: what its converter to ONNX writes, as runtimes run it."""

from __future__ import annotations

from typing import Any

import numpy as np


def pool_over_few_axes(graph: Any) -> bool:
    """Rewrites pools over all axes of an input as pools over those that get smaller; whether there were any.

    For images the converter puts two axes before the four there are, pools over all four, in windows of one over
    images and channels, and takes the two away again. onnxruntime pools over three axes at most.

    Args:
        graph: An `onnx.GraphProto`, changed in place.
    """
    makers = {name: node for node in graph.node for name in node.output}
    users = {name: node for node in graph.node for name in node.input}
    pools = [node for node in graph.node if node.op_type == "MaxPool" and len(_options(node)["kernel_shape"]) > 3]
    nodes, done = list(graph.node), []
    for pool in pools:
        second = makers[pool.input[0]]
        first, last = makers[second.input[0]], users[pool.output[0]]
        position = nodes.index(pool)
        nodes[position:position] = _pool_over_few_axes(first.input[0], last.output[0], pool)
        done += [first, second, pool, last]
    kept = [node for node in nodes if node not in done]
    axes = {name for node in done for name in node.input[1:]} - {name for node in kept for name in node.input}
    constants = [constant for constant in graph.initializer if constant.name not in axes]
    _replace(graph.node, kept)
    _replace(graph.initializer, constants)
    return bool(pools)


def _pool_over_few_axes(source: str, result: str, pool: Any) -> list[Any]:
    """Nodes that bring the axes that a pool does not change to the front, pool over the others, and bring them back."""
    from onnx.helper import make_node  # noqa: PLC0415  Slow, and not needed to train.

    options = _options(pool)
    rank = len(options["kernel_shape"])
    pads = np.reshape(options.pop("pads", [0] * 2 * rank), (2, rank))
    sizes = {name: np.array(values) for name, values in options.items()}  # Kernels, strides, dilations.
    changed = np.any([*(values > 1 for values in sizes.values()), *(pads > 0)], axis=0)
    order = np.argsort(changed, kind="stable")
    pooled: dict[str, Any] = {name: values[order[2:]] for name, values in sizes.items()} | {
        "pads": pads[:, order[2:]].ravel()
    }
    before, after = f"{pool.name}_axes_first", f"{pool.name}_axes_first_pooled"
    return [
        make_node("Transpose", [source], [before], f"{before}_of", perm=order),
        make_node("MaxPool", [before], [after], pool.name, **pooled),
        make_node("Transpose", [after], [result], f"{after}_back", perm=np.argsort(order)),
    ]


def _replace(repeated: Any, values: list[Any]) -> None:
    del repeated[:]
    repeated.extend(values)


def _options(node: Any) -> dict[str, Any]:
    from onnx.helper import get_attribute_value  # noqa: PLC0415  Slow, and not needed to train.

    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
