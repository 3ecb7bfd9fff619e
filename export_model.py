"""Stage 4: fuse everything into one deployable model per category, and evaluate it.

``--format torch`` puts segmentor, LGST and both normalisations together into ckpt/pytorch_models/{category}.pth, a
state dict with the published keys. ``--format onnx`` folds that model into ckpt/onnx_models/{category}.onnx, and
``--format openvino`` turns this into ckpt/openvino_models/{category}.xml and .bin; another ``--precision`` than fp32 is
in the file's name. Then, and alone with ``--inference_only``, every test image is scored: scores, AUROCs, milliseconds
and the largest difference from the torch fp32 model go to anomaly_score/, export_report.json and export_report.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import settings
from data import files, images, layouts
from data.workspace import Workspace
from deploy import exporters, quantisation
from deploy.assembly import fused_state
from deploy.engines import Engine, OnnxEngine, OpenVinoEngine, open_model
from errors import UserError, run_script
from evaluation import seeds
from evaluation.metrics import auroc, mean_known
from models.device import choose_device
from training.logical_synthesis import synthesise

WARM_UP = 3  # images scored before the clock counts
CALIBRATION_IMAGES = 64
FORMATS = ("torch", "onnx", "openvino")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
IMPOSSIBLE = {
    ("torch", "int8"): "PyTorch has no int8 here; use --format onnx or --format openvino",
    ("onnx", "bf16"): "onnxruntime has no bf16 kernels for CPUs; use --format torch, --format openvino, or --precision fp16",
}


def main() -> None:
    parser = settings.with_seeds(settings.command_line(__doc__))
    parser.add_argument("--format", default="torch", help=f"of the exported model: {', '.join(FORMATS)}")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the networks; the score is fp32 always")
    parser.add_argument("--with_map", action="store_true", help="onnx, openvino: give anomaly map and label map, too")
    parser.add_argument("--raw_input", action="store_true", help="onnx, openvino: take uint8 RGB and normalise inside")
    parser.add_argument("--inference_only", action="store_true", help="evaluate exported models, export nothing")
    args = parser.parse_args()
    if args.format not in FORMATS:
        raise UserError(f"there is no format '{args.format}'; choose from {', '.join(FORMATS)}")
    if (args.format, args.precision) in IMPOSSIBLE:
        raise UserError(IMPOSSIBLE[args.format, args.precision])
    if args.format == "torch" and (args.with_map or args.raw_input):
        raise UserError("--with_map and --raw_input are for --format onnx and openvino; a torch model always has maps")
    workspace = Workspace(args.workspace)
    dataset = layouts.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories)
    settings.check((category.name for category in categories), args)
    device = choose_device(args.device)
    with workspace.lock():
        runs = [export_and_evaluate(categories, home, args, device) for home in workspace.of_seeds(args.seeds).values()]
    if args.seeds and any(runs):
        lines = seeds.table(seeds.over_seeds(runs), args.seeds)
        files.write_text(workspace.over_seeds(f"export_report_{args.format}_{args.precision}"), "\n".join(lines) + "\n")
        print("\n" + "\n".join(lines))


def export_and_evaluate(categories: list[layouts.Category], workspace: Workspace, args: argparse.Namespace,
                        device: torch.device) -> dict[str, dict[str, float]]:
    """One workspace, which is one seed; returns {category: AUROCs and milliseconds}."""
    reports = []
    for category in categories:
        path = workspace.exported_model(category.name, args.format, args.precision)
        if not args.inference_only:
            # Always from the newest artefacts: nothing to skip or resume here.
            {"torch": export_torch, "onnx": export_onnx, "openvino": export_openvino}[args.format](
                category, workspace, path, args, device)
            print(f"{category.name}: wrote {path}")
        files.require(path, f"export_model.py --format {args.format} --precision {args.precision}")
        engine = open_model(path, device)
        exporters.require_category(engine.metadata, category.name, path)
        if not category.tested:
            print(f"{category.name}: there is no folder {category.root / 'test' / layouts.GOOD}, so nothing to evaluate")
            continue
        reports.append(evaluate(category, engine, workspace, args, device))
    if reports:
        write_report(reports, workspace)
    return {report["category"]: {name: report[name] for name in ("auroc_logical", "auroc_structural", "auroc_mean",
                                                                 "ms_per_image")} for report in reports}


def export_torch(category: layouts.Category, workspace: Workspace, path: Path, args: argparse.Namespace,
                 device: torch.device) -> None:
    files.write_state(path, fused_state(category.name, workspace, category.root.parent.name, args.precision))


def export_onnx(category: layouts.Category, workspace: Workspace, path: Path, args: argparse.Namespace,
                device: torch.device) -> None:
    source = files.require(workspace.exported_model(category.name, "torch"), "export_model.py --format torch")
    state = files.read_state(source)
    exporters.require_category(exporters.metadata(state), category.name, source)
    if args.precision != "int8":
        content = exporters.onnx_model(state, category.name, args.precision, args.with_map, args.raw_input)
        files.write_bytes(path, content)
        return

    content = exporters.onnx_model(state, category.name, "fp32", args.with_map, args.raw_input)
    known = OnnxEngine(content, device).metadata
    calibration = calibration_images(category, args.raw_input)

    def build(kept: tuple[str, ...]) -> tuple[bytes, Engine]:
        quantised = exporters.with_metadata(exporters.int8_onnx(content, calibration, kept), known | {"precision": "int8"})
        return quantised, OnnxEngine(quantised, device)

    quantised, noted = choose_int8(build, category, workspace, args, args.raw_input, device)
    files.write_bytes(path, exporters.with_metadata(quantised, known | noted))


def export_openvino(category: layouts.Category, workspace: Workspace, path: Path, args: argparse.Namespace,
                    device: torch.device) -> None:
    source = files.require(workspace.exported_model(category.name, "onnx"), "export_model.py --format onnx")
    known = OnnxEngine(source.read_bytes(), device).metadata
    exporters.require_category(known, category.name, source)
    for option in ("with_map", "raw_input"):
        if getattr(args, option) and not known[option]:
            raise UserError(f"{source} was exported without --{option}; run export_model.py --format onnx --{option} first")
    model = exporters.openvino_model(source.read_bytes(), args.precision)
    if args.precision != "int8":
        exporters.write_openvino(model, path, known | {"precision": args.precision})
        return

    calibration = calibration_images(category, known["raw_input"])

    def build(kept: tuple[str, ...]) -> tuple[object, Engine]:
        quantised = exporters.int8_openvino(model, calibration, kept)
        exporters.note_metadata(quantised, known | {"precision": "int8"})
        return quantised, OpenVinoEngine(quantised)

    quantised, noted = choose_int8(build, category, workspace, args, known["raw_input"], device)
    exporters.write_openvino(quantised, path, known | noted)


def calibration_images(category: layouts.Category, raw_input: bool) -> np.ndarray:
    """Training images, evenly spread over the sorted list, as the model takes them."""
    paths = category.train
    chosen = paths[::math.ceil(len(paths) / CALIBRATION_IMAGES)]
    return prepared(images.load_images(chosen, settings.IMAGE_SIZE, f"{category.name}: read training images"), raw_input)


def choose_int8(build, category: layouts.Category, workspace: Workspace, args: argparse.Namespace, raw_input: bool,
                device: torch.device) -> tuple[object, dict]:
    """Quantise as much as agrees with fp32; returns the model and what its metadata should say."""
    source = files.require(workspace.exported_model(category.name, "torch"), "export_model.py --format torch")
    check = make_check(category, open_model(source, device), args, raw_input)
    model, kept, agreement = quantisation.quantise(build, check, lambda line: print(f"{category.name}: {line}"))
    if not agreement.suffices:
        print(f"{category.name}: int8 changes the scores more than it should ({agreement}); judge it by the table below")
    return model, {"precision": "int8", "kept_in_higher_precision": kept, "agreement": agreement._asdict()}


def make_check(category: layouts.Category, fp32: Engine, args: argparse.Namespace, raw_input: bool) -> quantisation.Check:
    """Validation images, and one anomaly made from each by logical synthesis, with their fp32 scores."""
    chosen = settings.load(category.name, args.preset, settings.overrides(args)).segmentor
    good = images.load_images(category.validation, settings.IMAGE_SIZE, f"{category.name}: read validation images")
    rng = np.random.default_rng(args.seed)
    made, scores = torch.empty_like(good), []
    for index, image in enumerate(good):
        findings = fp32.findings(prepared(image[None], raw_input=False))
        scores.append(findings.score)
        # Anywhere in the image will do: here a component that hangs in the air is an anomaly like any other.
        anywhere = np.zeros(findings.label_map.shape[1:], dtype=bool)
        pasted, _ = synthesise(image.permute(1, 2, 0).numpy(), findings.label_map[0], anywhere, rng, chosen.paste_distance,
                               chosen.fill_holes)
        made[index] = torch.from_numpy(pasted.transpose(2, 0, 1).copy())
    scores += [fp32.score(prepared(image[None], raw_input=False)) for image in made]
    return quantisation.Check(prepared(torch.cat([good, made]), raw_input), np.concatenate(scores),
                              np.arange(2 * len(good)) < len(good))


def prepared(batch: torch.Tensor, raw_input: bool) -> np.ndarray:
    """uint8 RGB (N, 3, 256, 256) as a model takes it."""
    return (batch if raw_input else images.normalise(batch)).numpy()


def evaluate(category: layouts.Category, engine: Engine, workspace: Workspace, args: argparse.Namespace,
             device: torch.device) -> dict:
    """Score every test image one by one, as a production line would; write the CSV and the JSON beside it."""
    rows, seconds, preparing = [], [], []
    scores: dict[str, list[float]] = {kind: [] for kind in layouts.SPLITS}
    for kind, path in tqdm(category.test_images, desc=f"{category.name}: evaluate {engine.runtime}", unit="image"):
        start = time.perf_counter()
        image = torch.from_numpy(images.read_rgb(path, settings.IMAGE_SIZE).transpose(2, 0, 1).copy())[None]
        ready = prepared(image, engine.metadata.get("raw_input", False))
        between = time.perf_counter()
        score = float(engine.score(ready)[0])
        seconds.append(time.perf_counter() - between)
        preparing.append(between - start)
        scores[kind].append(score)
        rows.append((path.relative_to(category.root).as_posix(), kind, repr(score)))

    good = np.array(scores[layouts.GOOD])
    logical, structural = (auroc(good, np.array(scores[kind])) for kind in (layouts.LOGICAL, layouts.STRUCTURAL))
    target = workspace.evaluation(category.name, args.format, args.precision)
    report = {"category": category.name, "format": args.format, "precision": args.precision, "runtime": engine.runtime,
              "ran_in": engine.precision, "auroc_logical": logical, "auroc_structural": structural,
              "auroc_mean": mean_known([logical, structural]),
              "ms_per_image": _median_ms(seconds), "preprocessing_ms": _median_ms(preparing),
              "largest_difference": largest_difference(rows, category, engine, workspace, args, device),
              "kept_in_higher_precision": engine.metadata.get("kept_in_higher_precision", []),
              "images": len(rows), "dataset": category.root.parent.name, "device": str(device),
              "stand_ins": engine.metadata.get("stand_ins", []), "model": engine.metadata}

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("image", "kind", "score"))
    writer.writerows(rows)
    files.write_text(target, table.getvalue())
    files.write_json(target.with_suffix(".json"), report)
    return report


def largest_difference(rows: list[tuple[str, str, str]], category: layouts.Category, engine: Engine,
                       workspace: Workspace, args: argparse.Namespace, device: torch.device) -> float | None:
    """Of any score from the torch fp32 model's, or None where that model, or its evaluation, is not at hand."""
    if (args.format, args.precision) == ("torch", "fp32"):
        return 0.0
    reference = workspace.evaluation(category.name, "torch")
    if not reference.exists() or not reference.with_suffix(".json").exists():
        return None
    evaluated = files.read_json(reference.with_suffix(".json"))["model"]
    if evaluated.get("weights") != engine.metadata.get("weights"):
        return None  # the torch model was made anew and not evaluated since, or the other way round
    with open(reference, newline="", encoding="utf-8") as handle:
        expected = {row["image"]: float(row["score"]) for row in csv.DictReader(handle)}
    return max((abs(float(score) - expected[image]) for image, _, score in rows if image in expected), default=None)


def write_report(reports: list[dict], workspace: Workspace) -> None:
    """Print this run's table, and keep it together with those of earlier runs."""
    target = workspace.export_report
    key = ("category", "format", "precision")
    known = files.read_json(target) if target.exists() else []
    replaced = [[report[name] for name in key] for report in reports]
    slim = [{name: value for name, value in report.items() if name != "model"} for report in reports]
    known = sorted([one for one in known if [one[name] for name in key] not in replaced] + slim,
                   key=lambda one: [one[name] for name in key])
    files.write_json(target, known)
    files.write_text(target.with_suffix(".md"), "# Exported models\n\n" + table_of(known))
    print("\n" + table_of(slim), end="")


def table_of(reports: list[dict]) -> str:
    """A Markdown table that reads in a terminal, too; an average where there are several categories of one kind."""
    lines = [("category", "format", "precision", "ran in", "logical", "structural", "mean", "ms/image", "preprocessing ms",
              "largest difference")]
    rows = list(reports)
    for kind in sorted({(one["format"], one["precision"]) for one in reports}):
        same = [one for one in reports if (one["format"], one["precision"]) == kind]
        if len(same) > 1:
            numbers = ("auroc_logical", "auroc_structural", "auroc_mean", "ms_per_image", "preprocessing_ms")
            differences = [one["largest_difference"] for one in same]
            rows.append({"category": "average", "format": kind[0], "precision": kind[1],
                         "ran_in": "/".join(sorted({one["ran_in"] for one in same})),
                         "largest_difference": None if None in differences else max(differences)}
                        | {name: mean_known(one[name] for one in same) for name in numbers})
    for one in rows:
        difference = one["largest_difference"]
        found = [mean_known([one[name]]) for name in ("auroc_logical", "auroc_structural", "auroc_mean")]  # null is NaN
        lines.append((one["category"], one["format"], one["precision"], one["ran_in"], *(f"{value:.3f}" for value in found),
                      f"{one['ms_per_image']:.2f}",
                      f"{one['preprocessing_ms']:.2f}", "not known" if difference is None else f"{difference:.2g}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for one in reports:
        if one["precision"] == "int8":
            text.append(f"\n{one['category']}, {one['format']} int8: in higher precision besides label map, distances and "
                        f"score: {', '.join(one['kept_in_higher_precision']) or 'nothing'}")
    stand_ins = sorted({name for one in reports for name in one["stand_ins"]})
    if stand_ins:
        text.append(f"\nmade with stand-ins: {', '.join(stand_ins)}; not comparable with published figures")
    return "\n".join(text) + "\n"


def _median_ms(seconds: list[float]) -> float:
    return 1000 * float(np.median(seconds[WARM_UP:] or seconds))


if __name__ == "__main__":
    run_script(main)
