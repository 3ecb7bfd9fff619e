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
from types import SimpleNamespace
from typing import Any

import csad
from csad.data import files
from csad.errors import UserError
from csad.export.onnx_graphs import NETWORKS, half_networks, own_padding, own_weights, with_whole_minima
from csad.inference.engines import METADATA_KEY, precisions_of, require_package
from csad.inference.folded import FoldedModel
from csad.inference.openvino_engine import in_openvino_thread, read_openvino

import numpy as np
import torch

from models.constants import IMAGENET_MEAN, IMAGENET_STD
from models.fused import from_state, metadata
from models.prediction import Prediction

OPSET = 17
# For which onnxruntime has int8 kernels.
INT8_OPERATORS = ["Conv", "Relu", "AveragePool", "MaxPool", "Add", "Concat"]


def onnx_model(state: dict, category: str, precision: str, with_map: bool, raw_input: bool) -> bytes:
    """Fold a fused state dict and turn it into a checked ONNX file's content.

    Args:
        state: of the fused model; a published one has no metadata and gets what can be known.
        precision: fp32 or fp16, of the networks.
        with_map: outputs all of `Prediction` besides the score.
        raw_input: takes uint8 RGB.
    """
    fused = from_state(state)
    model_metadata = {
        "category": category,
        "input_size": fused.size,
        "branches": fused.branches,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    } | metadata(state)
    model_metadata |= {"with_map": with_map, "raw_input": raw_input, "precision": precision}
    outputs = Prediction._fields[: None if with_map else 1]
    content = to_onnx(FoldedModel(fused, with_map, raw_input), model_metadata, outputs)
    content = half_networks(content) if precision == "fp16" else content
    return with_metadata(content, model_metadata | {"networks": networks_of(content)})


def networks_of(content: bytes) -> dict[str, str]:
    """See `csad.inference.engines.precisions_of`: those of an ONNX model's convolutions."""
    onnx = require_package("onnx")
    graph = onnx.load_from_string(content).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    halves = {weight.name for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16}

    def precision(node: Any) -> str:
        quantised = all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
        return "int8" if quantised else "fp16" if halves.intersection(node.input) else "fp32"

    layers = (node for node in graph.node if node.op_type in ("Conv", "ConvTranspose"))
    return precisions_of((node.name, precision(node)) for node in layers)


def to_onnx(model: torch.nn.Module, metadata: dict[str, Any], outputs: tuple[str, ...]) -> bytes:
    """Trace a model of images (B, 3, size, size) with B left open; the metadata, which names the size, goes along as JSON."""
    onnx = require_package("onnx")
    buffer: Any = io.BytesIO()  # the tracing exporter takes one, whatever its hint says
    # Two images, so that nothing of size 1 is mistaken for a constant.
    dtype = torch.uint8 if metadata["raw_input"] else torch.float32
    example = torch.zeros(2, 3, metadata["input_size"], metadata["input_size"], dtype=dtype)
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
    exported = onnx.load_from_string(buffer.getvalue())
    own_weights(exported.graph)
    own_padding(exported)
    content = with_metadata(exported.SerializeToString(), metadata)
    onnx.checker.check_model(content, full_check=True)
    return content


def openvino_model(content: bytes, precision: str) -> Any:
    """An fp32 ONNX model as an `openvino.Model`; for fp16, with its networks in fp16."""
    content = with_whole_minima(half_networks(content) if precision == "fp16" else content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        return read_openvino(path)


def write_openvino(model: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Write an `openvino.Model` as .xml and .bin."""
    openvino = require_package("openvino")
    note_metadata(model, metadata)
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
        # The .xml last: it is what people open.
        for new in sorted(folder.iterdir(), key=lambda file: file.suffix == path.suffix):
            new.replace(path.with_name(new.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def int8_onnx(
    content: bytes,
    calibration: np.ndarray,
    fp32_prefixes: Sequence[str],
    networks: tuple[str, ...] = NETWORKS,
) -> bytes:
    """Quantise the networks of an fp32 ONNX model with onnxruntime, weights per channel.

    Args:
        calibration: images as the model takes them; the range of every activation is that on these.
        fp32_prefixes: beginnings of the names of nodes that stay in fp32, besides everything outside the networks.
        networks: how the names of the networks' nodes begin.
    """
    onnx, quantization = require_package("onnx"), require_package("onnxruntime.quantization")
    images = iter({"images": image[None]} for image in calibration)
    model = onnx.load_from_string(content)
    excluded = [
        node.name
        for node in model.graph.node
        if not node.name.startswith(networks) or node.name.startswith(tuple(fp32_prefixes))
    ]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            model,
            written,
            SimpleNamespace(get_next=lambda: next(images, None)),
            per_channel=True,
            op_types_to_quantize=INT8_OPERATORS,
            nodes_to_exclude=excluded,
        )
        return written.read_bytes()


def int8_openvino(
    model: Any, calibration: np.ndarray, fp32_prefixes: Sequence[str], networks: tuple[str, ...] = NETWORKS
) -> Any:
    """Quantise the networks of an `openvino.Model` with NNCF; arguments as in `int8_onnx`."""
    nncf = require_package("nncf")
    nncf.set_log_level("ERROR")
    patterns = [f"^(?!({'|'.join(networks)})).*", *(f"^{prefix}.*" for prefix in fp32_prefixes)]
    ignored = nncf.IgnoredScope(patterns=patterns, validate=False)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return in_openvino_thread(
            nncf.quantize,
            model,
            nncf.Dataset([{"images": image[None]} for image in calibration]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            ignored_scope=ignored,
        )


def with_metadata(content: bytes, metadata: dict[str, Any]) -> bytes:
    """The same ONNX model with other metadata."""
    onnx = require_package("onnx")
    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(_stamped(metadata))})
    return model.SerializeToString()


def note_metadata(model: Any, metadata: dict[str, Any]) -> None:
    """Keep metadata with an `openvino.Model`."""
    model.set_rt_info(json.dumps(_stamped(metadata)), METADATA_KEY)


def _stamped(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata | {"format_version": csad.FORMAT_VERSION}


def require_category(metadata: dict[str, Any], category: str, path: Path) -> None:
    """Refuse (UserError) a model that was made for another category; published files do not say for which."""
    if metadata.get("category", category) != category:
        raise UserError(f"{path} is a model of {metadata['category']}, expected {category}; export it again")
