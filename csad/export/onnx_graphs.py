"""ONNX graphs rewritten, with the same results: for quantisers, for OpenVINO, and with networks in fp16."""

from __future__ import annotations

import warnings
from typing import Any

from csad.inference.engines import require_package

import numpy as np

# How the names of the networks' nodes begin.
NETWORKS = (
    "/encoder/network",
    "/lgst/teacher/",
    "/lgst/student/",
    "/lgst/autoencoder/",
    "/segmentor/network/",
)


def own_weights(graph: Any) -> None:
    """Give every layer its own weights again where the exporter keeps equal ones once, which quantisers do not understand.

    And every convolution its own bias, also of a network that is called twice: OpenVINO adds a shared one in a pass of its own.
    """
    weights, taken = {weight.name: weight for weight in graph.initializer}, set()

    def copy(weight: Any, name: str) -> None:
        graph.initializer.add().CopyFrom(weight)
        graph.initializer[-1].name = name

    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in weights]:
        copy(weights[node.input[0]], node.output[0])
        graph.node.remove(node)
    weights = {weight.name: weight for weight in graph.initializer}
    with_bias = [node for node in graph.node if node.op_type == "Conv" and len(node.input) == 3]
    for node in (node for node in with_bias if node.input[2] in weights):
        if node.input[2] in taken:
            name = f"{node.name}/bias"
            copy(weights[node.input[2]], name)
            node.input[2] = name
        taken.add(node.input[2])


def own_padding(model: Any) -> None:
    """Let every convolution pad with zeros by itself, instead of a node before it.

    OpenVINO would do so as well, but not always rightly: it gave a 9x1 convolution a padding of 4 on both axes, and on
    processors without AVX-512 read memory that was never written.
    """
    graph = model.graph
    by_output = {name: node for node in graph.node for name in node.output}
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        pad = by_output.get(conv.input[0])
        if pad is None or pad.op_type != "Pad" or (padding := _zeros_around(model, pad)) is None:
            continue
        attributes = {attribute.name: attribute for attribute in conv.attribute}
        attributes["pads"].ints[:] = [own + more for own, more in zip(attributes["pads"].ints, padding)]
        conv.input[0] = pad.input[0]
    _remove_unused(graph)


def _zeros_around(model: Any, pad: Any) -> list[int] | None:
    """The zeros that a Pad node adds around (B, C, H, W): top, left, bottom, right; None if it pads in another way."""
    onnx = require_package("onnx")
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in pad.attribute}
    if attributes.get("mode", b"constant") != b"constant":
        return None
    amounts, *value = [_constant(model, name) for name in pad.input[1:3] if name]
    if amounts is None or len(amounts) != 8 or amounts.min() < 0 or any(amounts[[0, 1, 4, 5]]):
        return None
    return None if value and (value[0] is None or value[0] != 0) else amounts[[2, 3, 6, 7]].tolist()


def _constant(model: Any, name: str) -> np.ndarray | None:
    """The value of a name in a graph, where it depends on no image."""
    onnx, reference = require_package("onnx"), require_package("onnx.reference")
    needed = {name}
    nodes: list[Any] = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    if needed.intersection(entry.name for entry in model.graph.input):
        return None
    graph = onnx.helper.make_graph(
        nodes,
        "constant",
        [],
        [onnx.helper.make_empty_tensor_value_info(name)],
        [weight for weight in model.graph.initializer if weight.name in needed],
    )
    evaluator = reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    return evaluator.run(None, {})[0]


def _remove_unused(graph: Any) -> None:
    """Remove the nodes that no output depends on."""
    needed = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if needed.intersection(node.output):
            needed.update(node.input)
        else:
            graph.node.remove(node)


def half_networks(content: bytes) -> bytes:
    """The same ONNX model with its networks in fp16; inputs, outputs and what lies outside the networks stay in fp32."""
    onnx, float16 = require_package("onnx"), require_package("onnxruntime.transformers.float16")
    tools = require_package("onnxruntime.transformers.onnx_model")
    model = onnx.load_from_string(content)
    outside = [node.name for node in model.graph.node if not node.name.startswith(NETWORKS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each weight that becomes 0 in fp16
        model = float16.convert_float_to_float16(model, keep_io_types=True, node_block_list=outside)
    tools.OnnxModel(model).topological_sort()
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def with_whole_minima(content: bytes) -> bytes:
    """An ONNX model with the minimum over the patch memory's rows in one step again, which OpenVINO is faster at."""
    onnx = require_package("onnx")
    model = onnx.load_from_string(content)
    made_by = {name: node for node in model.graph.node for name in node.output}

    def before(node: Any, op_type: str) -> Any:
        previous = made_by.get(node.input[0]) if node is not None else None
        return previous if previous is not None and previous.op_type == op_type else None

    for last in [node for node in model.graph.node if node.op_type == "ReduceMin"]:
        first = before(last, "ReduceMin")
        groups = before(first, "Reshape")
        if groups is not None:
            last.input[0] = groups.input[0]
            for node in (first, groups):
                model.graph.node.remove(node)
    return model.SerializeToString()
