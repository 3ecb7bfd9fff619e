"""The published graph and ours in every runtime and precision that `benchmarks.speed` times."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from csad.export import exporters, onnx_graphs
from csad.export.int8 import FALLBACK_ORDER
from csad.inference.engines import Engine, as_input
from csad.inference.runtimes import OnnxEngine, TorchEngine, open_model

import numpy as np
import torch

from models.fused import FusedModel, attach_metadata, from_state, metadata, published_state

COMPILED = "torch.compile"
FORMAT_OF = {"torch": "torch", COMPILED: "torch", "onnxruntime": "onnx", "openvino": "openvino"}
PUBLISHED_GRAPH, OURS = "published", "ours"
CALIBRATION_IMAGES = 4  # of noise; for the speed of int8 it is enough that every layer has a range


class Variant(NamedTuple):
    """One graph in one runtime and precision; `run` takes (B, 3, size, size) uint8 and waits for the scores."""

    graph: str
    runtime: str
    precision: str
    ran_in: str
    run: Callable[[np.ndarray], np.ndarray]


def build_variants(
    state: dict, args: argparse.Namespace, device: str, reports: list[dict], folder: Path
) -> list[Variant]:
    """Both graphs in every runtime and precision asked for; ours as exported files."""
    variants = []
    category = metadata(state).get("category", "random")
    model = from_state(state)
    graph_metadata = {"category": category, "with_map": False, "raw_input": False, "precision": "fp32"}
    graph_metadata["input_size"] = model.size
    rng = np.random.default_rng(0)
    noise = as_input(
        rng.integers(0, 256, (CALIBRATION_IMAGES, 3, model.size, model.size), dtype=np.uint8), graph_metadata
    )
    paths = {}
    if {"onnxruntime", "openvino"} & set(args.runtimes):
        contents = {
            PUBLISHED_GRAPH: exporters.to_onnx(model, graph_metadata, ("score",)),
            OURS: exporters.onnx_model(state, category, "fp32", with_map=False, raw_input=False),
        }
        for graph, content in contents.items():
            paths[graph] = folder / f"{graph}.onnx"
            paths[graph].write_bytes(content)
    networks = {PUBLISHED_GRAPH: ("/",), OURS: onnx_graphs.NETWORKS}

    for precision in args.precisions:
        for runtime in ("torch", COMPILED):
            if runtime not in args.runtimes or precision == "int8":
                continue
            published = PublishedTorch(model, precision, device)
            ours = published_state(model)
            attach_metadata(ours, metadata(state) | {"precision": precision})
            in_torch = TorchEngine(ours, device)
            if runtime == COMPILED:
                for owner in (published, in_torch):  # on CUDA with CUDA graphs
                    compiled = torch.compile(owner.model, mode="reduce-overhead")
                    owner.model = cast(FusedModel, compiled)
            variants.append(Variant(PUBLISHED_GRAPH, runtime, precision, published.precision, published))
            variants.append(Variant(OURS, runtime, precision, in_torch.precision, in_torch.score))
        for runtime in ("onnxruntime", "openvino"):
            if runtime not in args.runtimes or (runtime, precision) == ("onnxruntime", "bf16"):
                continue
            for graph in (PUBLISHED_GRAPH, OURS):
                if graph == PUBLISHED_GRAPH and precision == "int8" and model.memory is not None:
                    continue  # quantised as a whole it does not run; with a patch memory nothing was published, either
                kept = kept_parts(reports, FORMAT_OF[runtime]) if graph == OURS else ()
                described = graph_metadata | {"precision": precision}
                engine = other_engine(runtime, paths[graph], described, noise, networks[graph], kept, device)
                variants.append(Variant(graph, runtime, precision, engine.precision, engine.score))
    return variants


class PublishedTorch:
    """The published graph in PyTorch's eager mode, as its own script runs it."""

    def __init__(self, model: FusedModel, precision: str, device: str):
        self.model, self.device = copy.deepcopy(model).to(device), device
        half = precision != "fp32" and not (precision == "fp16" and device == "cpu")
        self.precision = precision if half else "fp32"
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision) if half else None

    @torch.no_grad()
    def __call__(self, batch: np.ndarray) -> np.ndarray:
        with torch.autocast(self.device.partition(":")[0], self.dtype, enabled=self.dtype is not None):
            return self.model(torch.from_numpy(as_input(batch, {})).to(self.device)).cpu().numpy()


def other_engine(
    runtime: str,
    path: Path,
    graph_metadata: dict,
    calibration: np.ndarray,
    networks: tuple[str, ...],
    fp32_prefixes: tuple[str, ...],
    device: str,
) -> Engine:
    """A graph in ONNX, made ready for a runtime and the metadata's precision the way export_model.py does it.

    Args:
        calibration: images for int8.
        networks, fp32_prefixes: of the nodes that become int8, and of those among them that stay fp32.
    """
    precision = graph_metadata["precision"]
    if runtime == "onnxruntime":
        content = path.read_bytes()
        if precision == "int8":
            content = exporters.int8_onnx(content, calibration, fp32_prefixes, networks)
        if precision == "fp16":
            content = onnx_graphs.half_networks(content)
        return OnnxEngine(exporters.with_metadata(content, graph_metadata), device)
    model = exporters.openvino_model(path.read_bytes(), precision)
    if precision == "int8":
        model = exporters.int8_openvino(model, calibration, fp32_prefixes, networks)
    target = path.with_suffix(".xml")
    exporters.write_openvino(model, target, graph_metadata)
    return open_model(target, device)


def kept_parts(reports: list[dict], format_: str) -> tuple[str, ...]:
    """What int8 left in higher precision for the scores' sake, over all evaluated categories; at least the output layers."""
    names = {FALLBACK_ORDER[0][0]} | {
        name
        for report in reports
        if (report["format"], report["precision"]) == (format_, "int8")
        for name in report["kept_in_higher_precision"]
    }
    return tuple(prefix for name, prefixes in FALLBACK_ORDER if name in names for prefix in prefixes)
