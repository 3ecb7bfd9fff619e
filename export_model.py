"""Stage 4: fuse everything into one deployable model per category, and evaluate it.

``--format torch`` puts the fused branches and their normalisations together into ckpt/pytorch_models/{category}.pth, a
state dict with the published keys. ``--format onnx`` folds that model into ckpt/onnx_models/{category}.onnx, and
``--format openvino`` turns this into ckpt/openvino_models/{category}.xml and .bin; another ``--precision`` than fp32 is
in the file's name. Then, and alone with ``--inference_only``, every test image is scored: scores, AUROCs, milliseconds
and the largest difference from the torch fp32 model go to anomaly_score/, export_report.json and export_report.md.
"""

from __future__ import annotations

import threads  # noqa: F401

import argparse
import csv
import io
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import settings
from cluster.jobs import Task
from command_line import common_options, select, with_branches, with_cluster, with_seeds
from data import files, images, layouts
from data.workspace import FORMATS, PRECISIONS, Workspace
from deploy import exporters, quantisation, thresholds
from deploy.assembly import fused_state, require_up_to_date
from deploy.engines import Engine, OnnxEngine, OpenVinoEngine, TorchEngine, as_input, open_model
from errors import UserError, run_script
from evaluation import branch_weights, export_tables, seeds
from evaluation.metrics import auroc, mean_known
from models.device import choose_device
from models.fused import attach_metadata, metadata
from training.logical_synthesis import synthesise
from training.stage import job_name, run_jobs, view_of
from training.synthetic_defects import LOGICAL, STRUCTURAL, synthesise_defect

WARM_UP = 3  # images scored before the clock counts
CALIBRATION_IMAGES = 64
BATCH = 8  # images scored at a time where nothing is timed
GOOD_IMAGES, SYNTHETIC_DEFECTS = 64, 48  # the latter of each kind, structural and logical
IMPOSSIBLE = {
    ("torch", "int8"): "PyTorch has no int8 here; use --format onnx or --format openvino",
    ("onnx", "bf16"): "onnxruntime has no bf16 kernels for CPUs; use --format torch, --format openvino, or --precision fp16",
}


def main() -> None:
    parser = with_cluster(with_branches(with_seeds(common_options(__doc__))))
    parser.add_argument("--format", default="torch", help=f"of the exported model: {', '.join(FORMATS)}")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the networks; the score is fp32 always")
    parser.add_argument("--with_map", action="store_true", help="onnx, openvino: give anomaly maps and label map, too")
    parser.add_argument("--raw_input", action="store_true", help="onnx, openvino: take uint8 RGB and normalise inside")
    parser.add_argument("--inference_only", action="store_true", help="evaluate exported models, export nothing")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--set_threshold", type=float, metavar="SCORE",
                        help="change only the threshold of what is exported of one category, in every format: predict.py and "
                             "serve.py call higher scores anomalous")
    change.add_argument("--set_false_positive_rate", type=float, metavar="RATE",
                        help="the same, to what this share of good images may exceed (exports begin with 0.01)")
    args = parser.parse_args()
    if args.set_threshold is not None or args.set_false_positive_rate is not None:
        return change_thresholds(args)
    if args.format not in FORMATS:
        raise UserError(f"there is no format '{args.format}'; choose from {', '.join(FORMATS)}")
    if (args.format, args.precision) in IMPOSSIBLE:
        raise UserError(IMPOSSIBLE[args.format, args.precision])
    if args.format == "torch" and (args.with_map or args.raw_input):
        raise UserError("--with_map and --raw_input are for --format onnx and openvino; a torch model always has maps")
    run_jobs(args, jobs, partial(summarise, args))


def jobs(args: argparse.Namespace) -> dict[str, Task]:
    workspace, _, categories, chosen = select(args)
    device = str(choose_device(args.device))
    return {job_name(category, seed): Task(category, seed, partial(
        export_and_evaluate, category, place, args, chosen[category.name], device))
        for seed, place in workspace.of_seeds(args.seeds).items() for category in categories}


def summarise(args: argparse.Namespace, results: dict[str, dict | None]) -> None:
    """Write the table of each seed, and that over all seeds."""
    workspace, _, categories, _ = select(args)
    runs = []
    for seed, place in workspace.of_seeds(args.seeds).items():
        reports = [report for category in categories if (report := results.get(job_name(category, seed)))]
        if reports:
            export_tables.write(reports, place)
        runs.append({report["category"]: {name: report[name] for name in (
            "auroc_logical", "auroc_structural", "auroc_mean", "ms_per_image")} for report in reports})
    if args.seeds and all(runs):
        lines = seeds.table(seeds.over_seeds(runs), args.seeds)
        files.write_text(workspace.over_seeds(f"export_report_{args.format}_{args.precision}"), "\n".join(lines) + "\n")
        print("\n" + "\n".join(lines))


def change_thresholds(args: argparse.Namespace) -> None:
    if args.set_threshold is not None and len(args.categories or []) != 1:
        raise UserError("--set_threshold is for one category, as the scores of several have different scales; name it with "
                        "--categories, or take --set_false_positive_rate")
    places = (workspace := Workspace(args.workspace)).of_seeds(args.seeds).values()
    paths = [path for place in places for path in place.exported_models(args.categories)]
    with workspace.lock_with(places):
        for path, known in thresholds.change(paths, args.set_threshold, args.set_false_positive_rate):
            print(f"{path}: threshold {known['threshold']:.6g}, {known['threshold_words']}")


def export_and_evaluate(category: layouts.Category, workspace: Workspace, args: argparse.Namespace,
                        chosen: settings.Settings, device: str) -> dict | None:
    """What the evaluation came to; None without good test images."""
    category = replace(category)  # a copy, which takes its lists of files with it when it goes
    path = workspace.exported_model(category.name, args.format, args.precision)
    if not args.inference_only:
        # Always from the newest artefacts: nothing to skip or resume here.
        {"torch": export_torch, "onnx": export_onnx, "openvino": export_openvino}[args.format](
            category, workspace, path, args, chosen, device)
        print(f"{category.name}: wrote {path}")
    files.require(path, f"export_model.py --format {args.format} --precision {args.precision}")
    engine = open_model(path, device)
    if not args.inference_only:
        thresholds.write_beside(path, engine.metadata)
    exporters.require_category(engine.metadata, category.name, path)
    if not category.tested:
        print(f"{category.name}: there are no good test images, so nothing to evaluate")
        return None
    return evaluate(category, engine, workspace, args)


def export_torch(category: layouts.Category, workspace: Workspace, path: Path, args: argparse.Namespace,
                 chosen: settings.Settings, device: str) -> None:
    view, fusion = view_of(category, chosen), chosen.fusion
    weights, weighed = branch_weights.equal(fusion.branches), None
    branches = branch_weights.candidates(category.name, workspace, fusion)
    if fusion.weights == "synthetic_defects" and len(branches) > 1:
        state = fused_state(category, workspace, fusion, view, weights=branch_weights.equal(branches))
        engine = TorchEngine(state, device)
        decision = branch_weights.choose(*contributions_on_defects(engine, category, args.seed), engine.branches)
        branch_weights.write(category.name, workspace, fusion, decision)
        weights, weighed = decision.weights, branches
        print(f"{category.name}: {decision.description}")
    state = fused_state(category, workspace, fusion, view, args.precision, weights, weighed)
    attach_metadata(state, judged(metadata(state), TorchEngine(state, device), category))
    files.write_state(path, state)


def contributions_on_defects(engine: Engine, category: layouts.Category, seed: int
                             ) -> tuple[np.ndarray, dict[str, branch_weights.Defects]]:
    """What each branch adds to the score of validation images, as they are (n, K) and with synthetic defects of each kind."""
    paths = category.validation[::math.ceil(len(category.validation) / GOOD_IMAGES)]
    batch = 1 if engine.metadata.get("tiles", 1) > 1 else BATCH
    good, label_maps = [], []
    for first in tqdm(range(0, len(paths), batch), desc=f"{category.name}: score good images", unit="batch", leave=False):
        prediction = engine.predict(read(engine, paths[first:first + batch]))
        good.append(prediction.branch_scores)
        label_maps += list(prediction.label_map)
    rng, defects = np.random.default_rng(seed), {}
    for name, kinds in {"structural": STRUCTURAL, "logical": LOGICAL}.items():
        # Each kind at all strengths, on images spread over the list.
        order = rng.permutation(SYNTHETIC_DEFECTS)
        strengths = (order + rng.random(SYNTHETIC_DEFECTS)) / SYNTHETIC_DEFECTS
        contributions = []
        for first in tqdm(range(0, SYNTHETIC_DEFECTS, batch), desc=f"{category.name}: {name} defects", unit="batch", leave=False):
            defective = []
            for index in range(first, min(first + batch, SYNTHETIC_DEFECTS)):
                image = int(rng.integers(len(paths)))
                defective.append(synthesise_defect(read(engine, [paths[image]])[0].transpose(1, 2, 0), label_maps[image],
                                                   list(kinds)[index % len(kinds)], strengths[index], rng).transpose(2, 0, 1))
            contributions.append(engine.predict(np.stack(defective)).branch_scores)
        defects[name] = branch_weights.Defects(np.concatenate(contributions), strengths)
    return np.concatenate(good), defects


def read(engine: Engine, paths: Sequence[Path]) -> np.ndarray:
    """Images on disk as the engine takes them, (B, 3, size, size) uint8."""
    return images.read_views(paths, engine.size, "", engine.metadata.get("white_level"))


def export_onnx(category: layouts.Category, workspace: Workspace, path: Path, args: argparse.Namespace,
                chosen: settings.Settings, device: str) -> None:
    source = files.require(workspace.exported_model(category.name, "torch"), "export_model.py --format torch")
    state = files.read_state(source)
    exporters.require_category(metadata(state), category.name, source)
    require_up_to_date(metadata(state), category.name, workspace, source, "torch")
    if args.precision != "int8":
        content = exporters.onnx_model(state, category.name, args.precision, args.with_map, args.raw_input)
    else:
        plain = exporters.onnx_model(state, category.name, "fp32", args.with_map, args.raw_input)
        known = OnnxEngine(plain, device).metadata
        calibration = calibration_images(category, known)

        def build(kept: tuple[str, ...]) -> tuple[bytes, Engine]:
            quantised = exporters.with_metadata(exporters.int8_onnx(plain, calibration, kept), known | {"precision": "int8"})
            return quantised, OnnxEngine(quantised, device)

        content, noted = choose_int8(build, category, TorchEngine(state, device), chosen, args.seed)
        content = exporters.with_metadata(content, known | noted)
    engine = OnnxEngine(content, device)
    files.write_bytes(path, exporters.with_metadata(content, judged(engine.metadata, engine, category)))


def export_openvino(category: layouts.Category, workspace: Workspace, path: Path, args: argparse.Namespace,
                    chosen: settings.Settings, device: str) -> None:
    source = files.require(workspace.exported_model(category.name, "onnx"), "export_model.py --format onnx")
    known = OnnxEngine(source.read_bytes(), device).metadata
    exporters.require_category(known, category.name, source)
    require_up_to_date(known, category.name, workspace, source, "onnx")
    for option in ("with_map", "raw_input"):
        if getattr(args, option) and not known[option]:
            raise UserError(f"{source} was exported without --{option}; run export_model.py --format onnx --{option} first")
    model = exporters.openvino_model(source.read_bytes(), args.precision)
    noted: dict[str, Any] = {"precision": args.precision}
    if args.precision == "int8":
        calibration, plain = calibration_images(category, known), model

        def build(kept: tuple[str, ...]) -> tuple[object, Engine]:
            quantised = exporters.int8_openvino(plain, calibration, kept)
            exporters.note_metadata(quantised, known | {"precision": "int8"})
            return quantised, OpenVinoEngine(quantised)

        torch_model = files.require(workspace.exported_model(category.name, "torch"), "export_model.py --format torch")
        model, noted = choose_int8(build, category, open_model(torch_model, device), chosen, args.seed)
    exporters.note_metadata(model, known | noted)
    exporters.write_openvino(model, path, judged(known | noted, OpenVinoEngine(model), category))


def judged(known: dict[str, Any], engine: Engine, category: layouts.Category) -> dict[str, Any]:
    """Metadata with the threshold that follows from the model's own scores of the validation images.

    A published file without settings of ours keeps what it has: nobody knows its validation images.
    """
    paths = category.validation
    scores = [engine.score(images.read_views([path], engine.size, "", known.get("white_level")))
              for path in tqdm(paths, desc=f"{category.name}: score validation images", unit="image", leave=False)]
    return thresholds.with_validation_scores(known, np.concatenate(scores), category.name)


def calibration_images(category: layouts.Category, known: dict[str, Any]) -> np.ndarray:
    """Training images, evenly spread over the sorted list, as the model takes them."""
    paths = category.train
    spread = paths[::math.ceil(len(paths) / CALIBRATION_IMAGES)]
    views = images.read_views(spread, known["input_size"], f"{category.name}: read training images", known.get("white_level"))
    return as_input(views, known)


def choose_int8(build, category: layouts.Category, fp32: Engine, chosen: settings.Settings,
                seed: int) -> tuple[Any, dict[str, Any]]:
    """Quantise as much as agrees with fp32; returns the model and what its metadata should say."""
    check = make_check(category, fp32, chosen, seed)
    model, kept, agreement = quantisation.quantise(build, check, lambda line: print(f"{category.name}: {line}"))
    if not agreement.suffices:
        print(f"{category.name}: int8 changes the scores more than it should ({agreement}); judge it by the table below")
    return model, {"precision": "int8", "kept_in_higher_precision": kept, "agreement": agreement._asdict()}


def make_check(category: layouts.Category, fp32: Engine, chosen: settings.Settings, seed: int) -> quantisation.Check:
    """Validation images, and one anomaly made from each by logical synthesis, with their fp32 scores."""
    good = images.read_views(category.validation, fp32.size, f"{category.name}: read validation images",
                             fp32.metadata.get("white_level"))
    rng = np.random.default_rng(seed)
    made, scores = np.empty_like(good), []
    for index, image in enumerate(good):
        found = fp32.predict(image[None])
        scores.append(found.score)
        made[index] = with_a_part_too_many(image, found.label_map[0], rng, chosen)
    scores += [fp32.score(image[None]) for image in made]
    return quantisation.Check(np.concatenate([good, made]), np.concatenate(scores), np.arange(2 * len(good)) < len(good))


def with_a_part_too_many(image: np.ndarray, label_map: np.ndarray, rng: np.random.Generator, chosen: settings.Settings
                         ) -> np.ndarray:
    """A logical anomaly made from a good image (3, S, S) by logical synthesis, or two; the label map is (256, 256)."""
    factor = image.shape[-1] // images.SIZE
    label_map = np.kron(label_map, np.ones((factor, factor), np.uint8))
    # Anywhere in the image will do: here a component that hangs in the air is an anomaly like any other.
    anywhere = np.zeros(label_map.shape, dtype=bool)
    pasted, _ = synthesise(image.transpose(1, 2, 0), label_map, anywhere, rng, chosen.segmentor.paste_distance,
                           chosen.segmentor.fill_holes)
    return pasted.transpose(2, 0, 1)


def evaluate(category: layouts.Category, engine: Engine, workspace: Workspace, args: argparse.Namespace) -> dict:
    """Score every test image one by one, as a production line would; write the CSV and the JSON beside it.

    Raises:
        UserError: a score is not finite.
    """
    rows, seconds, preparing = [], [], []
    scores: dict[str, list[float]] = {split: [] for split in layouts.SPLITS}
    for split, path in tqdm(category.test_images, desc=f"{category.name}: evaluate {engine.runtime}", unit="image"):
        start = time.perf_counter()
        image = images.read_views([path], engine.size, "", engine.metadata.get("white_level"))
        between = time.perf_counter()
        score = float(engine.score(image)[0])
        seconds.append(time.perf_counter() - between)
        preparing.append(between - start)
        if not math.isfinite(score):
            raise UserError(f"{category.name}: the {engine.runtime} model gives {path.name} a score that is not finite; "
                            "export it again")
        scores[split].append(score)
        rows.append((path.relative_to(category.root).as_posix(), split, repr(score)))

    good = np.array(scores[layouts.GOOD])
    logical, structural = (auroc(good, np.array(scores[split])) for split in (layouts.LOGICAL, layouts.STRUCTURAL))
    target = workspace.evaluation(category.name, args.format, args.precision)
    report = {"category": category.name, "format": args.format, "precision": args.precision, "runtime": engine.runtime,
              "ran_in": engine.precision, "branches": engine.branches, "auroc_logical": logical, "auroc_structural": structural,
              "auroc_mean": mean_known([logical, structural]),
              "ms_per_image": _median_ms(seconds), "preprocessing_ms": _median_ms(preparing),
              "largest_difference": largest_difference(rows, engine, workspace, category.name, args),
              "kept_in_higher_precision": engine.metadata.get("kept_in_higher_precision", []),
              "images": len(rows), "dataset": category.root.resolve().parent.name, "device": engine.device,
              "stand_ins": engine.metadata.get("stand_ins", [])}

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("image", "split", "score"))
    writer.writerows(rows)
    files.write_text(target, table.getvalue())
    files.write_json(target.with_suffix(".json"), report | {"model": engine.metadata})
    return report


def largest_difference(rows: list[tuple[str, str, str]], engine: Engine, workspace: Workspace, category: str,
                       args: argparse.Namespace) -> float | None:
    """Of any score from the torch fp32 model's, or None where that model, or its evaluation, is not at hand."""
    if (args.format, args.precision) == ("torch", "fp32"):
        return 0.0
    reference = workspace.evaluation(category, "torch")
    if not reference.exists() or not reference.with_suffix(".json").exists():
        return None
    evaluated = files.read_json(reference.with_suffix(".json"), keys=("model",))["model"]
    if any(evaluated.get(key) != engine.metadata.get(key) for key in ("weights", "branch_weights")):
        return None  # the torch model was made anew and not evaluated since, or the other way round
    with open(reference, newline="", encoding="utf-8") as handle:
        expected = {row["image"]: float(row["score"]) for row in csv.DictReader(handle)}
    return max((abs(float(score) - expected[image]) for image, _, score in rows if image in expected), default=None)


def _median_ms(seconds: list[float]) -> float:
    return 1000 * float(np.median(seconds[WARM_UP:] or seconds))


if __name__ == "__main__":
    run_script(main)
