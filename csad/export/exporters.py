"""Write a fused model for other runtimes: ONNX with a batch size left open, OpenVINO's two files (docs/method.md section 4)."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import csad
from csad.data import files
from csad.errors import UserError
from csad.inference.engines import METADATA_KEY, NODES, in_openvino_thread, read_openvino, require_package
from csad.inference.folded import SCORE_ONLY, FoldedModel

import numpy as np
import torch

from models.constants import IMAGENET_MEAN, IMAGENET_STD
from models.fused import from_state, metadata
from models.prediction import Prediction

OPSET = 17
INT8_OPERATORS = [
    "Conv",
    "Relu",
    "AveragePool",
    "MaxPool",
    "Add",
    "Concat",
]  # for which onnxruntime has int8 kernels
# How the names of the networks' nodes begin.
NETWORKS = (
    "/encoder/network",
    "/lgst/teacher/",
    "/lgst/student/",
    "/lgst/autoencoder/",
    "/segmentor/network/",
)


def onnx_model(state: dict, category: str, precision: str, with_map: bool, raw_input: bool) -> bytes:
    """Fold a fused state dict and turn it into a checked ONNX file's content.

    Args:
        state: of the fused model; a published one has no metadata and gets what can be known.
        precision: fp32 or fp16, of the networks.
        with_map: outputs all of `Prediction` besides the score.
        raw_input: takes uint8 RGB.
    """
    fused = from_state(state)
    known = {
        "category": category,
        "input_size": fused.size,
        "branches": fused.branches,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    } | metadata(state)
    known |= {"with_map": with_map, "raw_input": raw_input, "precision": precision}
    content = to_onnx(
        FoldedModel(fused, with_map, raw_input), known, Prediction._fields if with_map else SCORE_ONLY
    )
    content = half_networks(content) if precision == "fp16" else content
    return with_metadata(content, known | {"networks": networks_of(content)})


def networks_of(content: bytes) -> dict[str, str]:
    """The precision of each network's layers in an ONNX model, all of them where they differ (int8/fp32)."""
    onnx = require_package("onnx")
    graph = onnx.load_from_string(content).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    halves = {weight.name for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16}
    found: dict[str, set[str]] = {}
    for node in graph.node:
        network = next((name for name, starts in NODES.items() if node.name.startswith(starts)), None)
        if network is None or node.op_type not in ("Conv", "ConvTranspose"):
            continue
        quantised = all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
        found.setdefault(network, set()).add(
            "int8" if quantised else "fp16" if halves.intersection(node.input) else "fp32"
        )
    return {name: "/".join(sorted(found[name])) for name in NODES if name in found}


def to_onnx(model: torch.nn.Module, known: dict[str, Any], outputs: tuple[str, ...]) -> bytes:
    """Trace a model of images (B, 3, size, size) with B left open; the metadata, which names the size, goes along as JSON."""
    onnx = require_package("onnx")
    buffer = io.BytesIO()
    # Two images, so that nothing of size 1 is mistaken for a constant.
    dtype = torch.uint8 if known["raw_input"] else torch.float32
    example = torch.zeros(2, 3, known["input_size"], known["input_size"], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant sizes are meant to be constant
        # The tracing exporter needs no further package and names nodes after modules, which quantisation goes by.
        torch.onnx.export(
            model,
            (example,),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in ("images", *outputs)},
        )
    model = onnx.load_from_string(buffer.getvalue())
    _own_weights(model.graph)
    _own_padding(model)
    content = with_metadata(model.SerializeToString(), known)
    onnx.checker.check_model(content, full_check=True)
    return content


def _own_weights(graph: Any) -> None:
    """Give every layer its own weights again where the exporter keeps equal ones once, which quantisers do not understand.

    And every convolution its own bias, also of a network that is called twice: OpenVINO adds a shared one in a pass of its own.
    """
    weights, used = {weight.name: weight for weight in graph.initializer}, set()

    def copy(weight: Any, name: str) -> None:
        graph.initializer.add().CopyFrom(weight)
        graph.initializer[-1].name = name

    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in weights]:
        copy(weights[node.input[0]], node.output[0])
        graph.node.remove(node)
    weights = {weight.name: weight for weight in graph.initializer}
    for node in [
        node
        for node in graph.node
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in weights
    ]:
        if node.input[2] in used:
            name = f"{node.name}/bias"
            copy(weights[node.input[2]], name)
            node.input[2] = name
        used.add(node.input[2])


def _own_padding(model: Any) -> None:
    """Let every convolution pad with zeros by itself, instead of a node before it.

    OpenVINO would do so as well, but not always rightly: it gave a 9x1 convolution a padding of 4 on both axes, and on
    processors without AVX-512 read memory that was never written.
    """
    graph = model.graph
    by_output = {name: node for node in graph.node for name in node.output}
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        pad = by_output.get(conv.input[0])
        padding = None if pad is None or pad.op_type != "Pad" else _zeros_around(model, pad)
        if padding is None:
            continue
        attributes = {attribute.name: attribute for attribute in conv.attribute}
        attributes["pads"].ints[:] = [own + more for own, more in zip(attributes["pads"].ints, padding)]
        conv.input[0] = pad.input[0]
    _remove_unused(graph)


def _zeros_around(model: Any, pad: Any) -> list[int] | None:
    """By how much a Pad node adds zeros to the height and width of (B, C, H, W): top, left, bottom, right; None: otherwise."""
    onnx = require_package("onnx")
    if (
        next(
            (onnx.helper.get_attribute_value(one) for one in pad.attribute if one.name == "mode"), b"constant"
        )
        != b"constant"
    ):
        return None
    amounts, *value = [_constant(model, name) for name in pad.input[1:3] if name]
    if amounts is None or len(amounts) != 8 or amounts.min() < 0 or any(amounts[[0, 1, 4, 5]]):
        return None
    return None if value and (value[0] is None or value[0] != 0) else amounts[[2, 3, 6, 7]].tolist()


def _constant(model: Any, name: str) -> np.ndarray | None:
    """The value of a name in a graph, where it depends on no image."""
    onnx, reference = require_package("onnx"), require_package("onnx.reference")
    needed, nodes = {name}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    if needed.intersection(given.name for given in model.graph.input):
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
        warnings.simplefilter("ignore")  # weights that become 0 in fp16 are said one by one
        model = float16.convert_float_to_float16(model, keep_io_types=True, node_block_list=outside)
    tools.OnnxModel(model).topological_sort()
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def openvino_model(content: bytes, precision: str) -> Any:
    """An fp32 ONNX model as an `openvino.Model`; for fp16, with its networks in fp16."""
    content = _with_whole_minima(half_networks(content) if precision == "fp16" else content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        return read_openvino(path)


def _with_whole_minima(content: bytes) -> bytes:
    """An ONNX model with the minimum over the patch memory's rows in one step again, which OpenVINO is faster at."""
    onnx = require_package("onnx")
    model = onnx.load_from_string(content)
    made_by = {name: node for node in model.graph.node for name in node.output}

    def before(node: Any, kind: str) -> Any:
        found = made_by.get(node.input[0]) if node is not None else None
        return found if found is not None and found.op_type == kind else None

    for last in [node for node in model.graph.node if node.op_type == "ReduceMin"]:
        first = before(last, "ReduceMin")
        groups = before(first, "Reshape")
        if groups is not None:
            last.input[0] = groups.input[0]
            for node in (first, groups):
                model.graph.node.remove(node)
    return model.SerializeToString()


def write_openvino(model: Any, path: Path, known: dict[str, Any]) -> None:
    """Write an `openvino.Model` as .xml and .bin."""
    openvino = require_package("openvino")
    note_metadata(model, known)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as new:
        written = Path(folder) / path.name
        # Not OpenVINO's own fp16: that one would also round the inverse covariances, and the distances with them.
        openvino.save_model(model, written, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            files.write_bytes(new.with_suffix(suffix), written.with_suffix(suffix).read_bytes())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a new export; it takes the old one's place at the end, and none where an exception ends it."""
    folder = path.with_name(f".{path.name}.new")  # always the same: what a killed run left is removed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        if path.suffix == ".xml":
            path.unlink(missing_ok=True)  # an old .xml would open with the new .bin and give wrong scores
        for new in sorted(
            folder.iterdir(), key=lambda one: one.suffix == path.suffix
        ):  # the .xml last: it is what people open
            new.replace(path.with_name(new.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def int8_onnx(
    content: bytes, calibration: np.ndarray, kept: Sequence[str], networks: tuple[str, ...] = NETWORKS
) -> bytes:
    """Quantise the networks of an fp32 ONNX model with onnxruntime, weights per channel.

    Args:
        calibration: images as the model takes them; the range of every activation is that on these.
        kept: beginnings of the names of nodes that stay in fp32, besides everything outside the networks.
        networks: how the names of the networks' nodes begin.
    """
    onnx, quantization = require_package("onnx"), require_package("onnxruntime.quantization")
    images = iter(calibration)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {"images": image[None]}

    model = onnx.load_from_string(content)
    excluded = [
        node.name
        for node in model.graph.node
        if not node.name.startswith(networks) or node.name.startswith(tuple(kept))
    ]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            model,
            written,
            Reader(),
            per_channel=True,
            op_types_to_quantize=INT8_OPERATORS,
            nodes_to_exclude=excluded,
        )
        return written.read_bytes()


def int8_openvino(
    model: Any, calibration: np.ndarray, kept: Sequence[str], networks: tuple[str, ...] = NETWORKS
) -> Any:
    """Quantise the networks of an `openvino.Model` with NNCF; arguments as in `int8_onnx`."""
    nncf = require_package("nncf")
    nncf.set_log_level("ERROR")
    outside = f"^(?!({'|'.join(networks)})).*"
    ignored = nncf.IgnoredScope(patterns=[outside, *(f"^{prefix}.*" for prefix in kept)], validate=False)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return in_openvino_thread(
            nncf.quantize,
            model,
            nncf.Dataset([{"images": image[None]} for image in calibration]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            ignored_scope=ignored,
        )


def with_metadata(content: bytes, known: dict[str, Any]) -> bytes:
    """The same ONNX model with other metadata."""
    onnx = require_package("onnx")
    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(_stamped(known))})
    return model.SerializeToString()


def note_metadata(model: Any, known: dict[str, Any]) -> None:
    """Keep metadata with an `openvino.Model`."""
    model.set_rt_info(json.dumps(_stamped(known)), METADATA_KEY)


def _stamped(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata | {"format_version": csad.FORMAT_VERSION}


def require_category(known: dict[str, Any], category: str, path: Path) -> None:
    """Refuse a model that was made for another category; published files do not say for which.

    Raises:
        UserError: it was.
    """
    if known.get("category", category) != category:
        raise UserError(f"{path} is a model of {known['category']}, expected {category}; export it again")
