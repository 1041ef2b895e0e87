"""Corrections of the ONNX files that converters write, so that runtimes can run them. It needs `onnx`."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.helper import get_attribute_value, make_node, make_tensor


def fix_and_check(path: Path) -> None:
    """Makes sure that runtimes can run a file, or removes it: converters also write operations that ONNX lacks.

    Raises:
        NotImplementedError: The file cannot be corrected; the message says why.
        onnx.checker.ValidationError: The file is not valid.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        if _fix(model):
            onnx.save(model, path)
        onnx.checker.check_model(path)  # Given its path, because a model of more than 2 GB is several files.
    except Exception:
        path.unlink()
        raise


def _fix(model: Any) -> bool:
    """Corrects known faults of the converter that wrote a model, in place; returns whether it changed anything."""
    if model.producer_name == "jax2onnx":
        return _pool_over_few_axes(model.graph)
    if model.producer_name == "tf2onnx":
        _refuse_lost_constants(model.graph)
        return _compute_erfc_by_erf(model.graph)
    return False


def _pool_over_few_axes(graph: Any) -> bool:
    """Rewrites pools over all axes of an input as pools over the axes that they change.

    For images, jax2onnx inserts two axes before the existing four, pools over all four, with windows of size one over
    examples and channels, and removes the two axes again. onnxruntime pools over at most three axes.
    """
    makers = {name: node for node in graph.node for name in node.output}
    users = {name: node for node in graph.node for name in node.input}
    pools = [node for node in graph.node if node.op_type == "MaxPool" and len(_options(node)["kernel_shape"]) > 3]
    nodes, replaced = list(graph.node), []
    for pool in pools:
        second = makers[pool.input[0]]
        first, last = makers[second.input[0]], users[pool.output[0]]
        position = nodes.index(pool)
        nodes[position:position] = _small_pool(first.input[0], last.output[0], pool)
        replaced += [first, second, pool, last]
    kept = [node for node in nodes if node not in replaced]
    unused = {name for node in replaced for name in node.input[1:]} - {name for node in kept for name in node.input}
    _set(graph.node, kept)
    _set(graph.initializer, [constant for constant in graph.initializer if constant.name not in unused])
    return bool(pools)


def _small_pool(source: str, result: str, pool: Any) -> list[Any]:
    """Nodes that move the axes that a pool leaves alone to the front, pool over the others, and move them back."""
    options = _options(pool)
    rank = len(options["kernel_shape"])
    pads = np.reshape(options.pop("pads", [0] * 2 * rank), (2, rank))
    sizes = {name: np.array(values) for name, values in options.items()}  # Kernels, strides, dilations.
    changed = np.any([*(values > 1 for values in sizes.values()), *(pads > 0)], axis=0)
    order = np.argsort(changed, kind="stable")
    pooled: dict[str, Any] = {name: values[order[2:]] for name, values in sizes.items()}
    pooled["pads"] = pads[:, order[2:]].ravel()
    before, after = f"{pool.name}_axes_first", f"{pool.name}_axes_first_pooled"
    return [
        make_node("Transpose", [source], [before], f"{before}_of", perm=order),
        make_node("MaxPool", [before], [after], pool.name, **pooled),
        make_node("Transpose", [after], [result], f"{after}_back", perm=np.argsort(order)),
    ]


def _refuse_lost_constants(graph: Any) -> None:
    """tf2onnx turns constants that a layer keeps as tensors into inputs; their values are lost."""
    lost = [node.name for node in graph.input if ":" in node.name]
    if lost:
        raise NotImplementedError(f"the converter does not keep the constants of layers ({', '.join(lost)})")


def _compute_erfc_by_erf(graph: Any) -> bool:
    """Rewrites Erfc, from which TensorFlow computes GELU, as 1 - Erf: ONNX has no Erfc, but tf2onnx writes it."""
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
    _set(graph.node, nodes)
    return changed


def _set(repeated: Any, values: list[Any]) -> None:
    del repeated[:]
    repeated.extend(values)


def _options(node: Any) -> dict[str, Any]:
    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
