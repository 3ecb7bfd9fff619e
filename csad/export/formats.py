"""A category's model in each format: torch from the checkpoints, ONNX from the torch file, OpenVINO from the ONNX file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.export import exporters, weighing
from csad.export.assembly import fused_state, require_up_to_date
from csad.export.int8 import calibration_images, choose_int8
from csad.inference.engines import Engine
from csad.inference.openvino_engine import OpenVinoEngine
from csad.inference.runtimes import OnnxEngine, TorchEngine
from csad.settings import Settings
from csad.training.stage import view_of

from models import fused


@dataclass(frozen=True)
class ExportJob:
    """One category and seed of stage 4."""

    category: layouts.Category
    workspace: Workspace  # of this seed
    settings: Settings
    args: argparse.Namespace  # the command line, with this seed
    device: str


def export(job: ExportJob, path: Path) -> TorchEngine:
    """Write the model in the wanted format and precision; returns the fp32 PyTorch model that it should agree with."""
    exporter = {"torch": export_torch, "onnx": export_onnx, "openvino": export_openvino}[job.args.format]
    return exporter(job, path)


def export_torch(job: ExportJob, path: Path) -> TorchEngine:
    category, workspace, args = job.category, job.workspace, job.args
    view, fusion = view_of(category, job.settings), job.settings.fusion
    weights, weighed = weighing.decide(category, workspace, fusion, view, args.seed, job.device)
    names = job.settings.names
    state = fused_state(category, workspace, fusion, view, weights, args.precision, weighed, names)
    files.write_state(path, state)
    return TorchEngine(state, "cpu", "fp32")


def export_onnx(job: ExportJob, path: Path) -> TorchEngine:
    category, workspace, args, device = job.category, job.workspace, job.args, job.device
    source = files.require(workspace.exported_model(category.name, "torch"), "export_model.py --format torch")
    state = files.read_state(source)
    exporters.require_category(fused.metadata(state), category.name, source)
    require_up_to_date(fused.metadata(state), category.name, workspace, source, "torch")
    reference = TorchEngine(state, "cpu", "fp32")
    if args.precision != "int8":
        content = exporters.onnx_model(state, category.name, args.precision, args.with_map, args.raw_input)
    else:
        plain = exporters.onnx_model(state, category.name, "fp32", args.with_map, args.raw_input)
        metadata = OnnxEngine(plain, device).metadata
        calibration = calibration_images(category, metadata)

        def build(fp32_prefixes: tuple[str, ...]) -> tuple[bytes, Engine]:
            quantised = exporters.int8_onnx(plain, calibration, fp32_prefixes)
            quantised = exporters.with_metadata(quantised, metadata | {"precision": "int8"})
            return quantised, OnnxEngine(quantised, device)

        distance = job.settings.segmentor.paste_distance
        content, noted = choose_int8(build, category, reference, distance, args.seed)
        noted["networks"] = exporters.networks_of(content)
        content = exporters.with_metadata(content, metadata | noted)
    files.write_bytes(path, content)
    return reference


def export_openvino(job: ExportJob, path: Path) -> TorchEngine:
    category, workspace, args, device = job.category, job.workspace, job.args, job.device
    source = files.require(workspace.exported_model(category.name, "onnx"), "export_model.py --format onnx")
    metadata = OnnxEngine(source.read_bytes(), device).metadata
    exporters.require_category(metadata, category.name, source)
    require_up_to_date(metadata, category.name, workspace, source, "onnx")
    for option in ("with_map", "raw_input"):
        if getattr(args, option) and not metadata[option]:
            raise UserError(
                f"{source} was exported without --{option}; run export_model.py --format onnx --{option} first"
            )
    torch_model = workspace.exported_model(category.name, "torch")
    files.require(torch_model, "export_model.py --format torch")
    reference = TorchEngine(files.read_state(torch_model), "cpu", "fp32")
    if reference.metadata.get("weights") != metadata.get("weights"):
        raise UserError(f"{source} was not made from {torch_model}; run export_model.py --format onnx first")
    # The ONNX model's; OpenVINO itself says in which precision each layer runs.
    metadata.pop("networks", None)
    model = exporters.openvino_model(source.read_bytes(), args.precision)
    noted: dict[str, Any] = {"precision": args.precision}
    if args.precision == "int8":
        calibration, plain = calibration_images(category, metadata), model

        def build(fp32_prefixes: tuple[str, ...]) -> tuple[object, Engine]:
            quantised = exporters.int8_openvino(plain, calibration, fp32_prefixes)
            exporters.note_metadata(quantised, metadata | {"precision": "int8"})
            return quantised, OpenVinoEngine(quantised)

        distance = job.settings.segmentor.paste_distance
        model, noted = choose_int8(build, category, reference, distance, args.seed)
    exporters.write_openvino(model, path, metadata | noted)
    return reference
