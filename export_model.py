"""Stage 4: fuse everything into one deployable model per category, and evaluate it.

``--format torch`` puts the fused branches and their normalisations together into ckpt/pytorch_models/{category}.pth, a
state dict with the published keys. ``--format onnx`` folds that model into ckpt/onnx_models/{category}.onnx, and
``--format openvino`` turns this into ckpt/openvino_models/{category}.xml and .bin; another ``--precision`` than fp32 is
in the file's name. Before a new file takes the old one's place a process of its own opens it and scores the validation images:
its threshold is from there, and scores that are not PyTorch's end the export (csad.export.agreement). Then, and alone with
``--inference_only``, every test image is scored: scores, AUROCs, milliseconds and the largest difference from the torch
fp32 model go to anomaly_score/, export_report.json and export_report.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from csad import settings
from csad.cli import common_options, select, with_branches, with_cluster, with_seeds
from csad.data import files, images, layouts
from csad.data.workspace import FORMATS, PRECISIONS, Workspace
from csad.errors import UserError, run_script
from csad.evaluation import export_tables, seeds
from csad.evaluation.metrics import auroc, mean_known
from csad.export import agreement, exported_thresholds, exporters, fresh_process, quantisation, weighing
from csad.export.assembly import fused_state, require_up_to_date
from csad.inference.engines import (
    Engine,
    OnnxEngine,
    OpenVinoEngine,
    TorchEngine,
    as_input,
    open_model,
    read_for,
)
from csad.progress import ProgressBar
from csad.training.jobs import Task, run_jobs
from csad.training.logical_synthesis import label_parts, synthesise
from csad.training.stage import job_name, view_of

import numpy as np

from models.device import choose_device
from models.fused import metadata

WARM_UP = 3  # images scored before the clock counts
CALIBRATION_IMAGES = 64
IMPOSSIBLE = {
    ("torch", "int8"): "PyTorch has no int8 here; use --format onnx or --format openvino",
    (
        "onnx",
        "bf16",
    ): "onnxruntime has no bf16 kernels for CPUs; use --format torch, --format openvino, or --precision fp16",
}


def main() -> None:
    parser = with_cluster(with_branches(with_seeds(common_options(__doc__))))
    parser.add_argument("--format", default="torch", help=f"of the exported model: {', '.join(FORMATS)}")
    parser.add_argument(
        "--precision", default="fp32", choices=PRECISIONS, help="of the networks; the score is fp32 always"
    )
    parser.add_argument(
        "--with_map", action="store_true", help="onnx, openvino: give anomaly maps and label map, too"
    )
    parser.add_argument(
        "--raw_input", action="store_true", help="onnx, openvino: take uint8 RGB and normalise inside"
    )
    parser.add_argument(
        "--inference_only", action="store_true", help="evaluate exported models, export nothing"
    )
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--set_threshold",
        type=float,
        metavar="SCORE",
        help="change only the threshold of what is exported of one category, in every format: predict.py and "
        "serve.py call higher scores anomalous",
    )
    change.add_argument(
        "--set_false_positive_rate",
        type=float,
        metavar="RATE",
        help="the same, to what this share of good images may exceed (exports begin with 0.01)",
    )
    args = parser.parse_args()
    if args.set_threshold is not None or args.set_false_positive_rate is not None:
        return change_thresholds(args)
    if args.format not in FORMATS:
        raise UserError(f"there is no format '{args.format}'; choose from {', '.join(FORMATS)}")
    if (args.format, args.precision) in IMPOSSIBLE:
        raise UserError(IMPOSSIBLE[args.format, args.precision])
    if args.format == "torch" and (args.with_map or args.raw_input):
        raise UserError(
            "--with_map and --raw_input are for --format onnx and openvino; a torch model always has maps"
        )
    run_jobs(args, jobs, partial(summarise, args))


def jobs(args: argparse.Namespace) -> dict[str, Task]:
    workspace, _, categories, chosen = select(args)
    device = str(choose_device(args.device))
    for place in workspace.of_seeds(args.seeds).values():
        export_tables.read(place)  # what is wrong with it should not come out after all the work
    return {
        job_name(category, seed): Task(
            category,
            seed,
            partial(
                export_and_evaluate,
                category,
                place,
                argparse.Namespace(**vars(args) | ({} if seed is None else {"seed": seed})),
                chosen[category.name],
                device,
            ),
        )
        for seed, place in workspace.of_seeds(args.seeds).items()
        for category in categories
    }


def summarise(args: argparse.Namespace, results: dict[str, dict | None]) -> None:
    """Write the table of each seed, and that over all seeds."""
    workspace, _, categories, _ = select(args)
    runs = []
    for seed, place in workspace.of_seeds(args.seeds).items():
        reports = [report for category in categories if (report := results.get(job_name(category, seed)))]
        if reports:
            export_tables.write(reports, place)
        runs.append(
            {
                report["category"]: {
                    name: report[name]
                    for name in ("auroc_logical", "auroc_structural", "auroc_mean", "ms_per_image")
                }
                for report in reports
            }
        )
    if args.seeds and all(runs):
        lines = seeds.table(seeds.over_seeds(runs), args.seeds)
        files.write_text(
            workspace.over_seeds(f"export_report_{args.format}_{args.precision}"), "\n".join(lines) + "\n"
        )
        print("\n" + "\n".join(lines))


def change_thresholds(args: argparse.Namespace) -> None:
    if args.set_threshold is not None and len(args.categories or []) != 1:
        raise UserError(
            "--set_threshold is for one category, as the scores of several have different scales; name it with "
            "--categories, or take --set_false_positive_rate"
        )
    places = (workspace := Workspace(args.workspace)).of_seeds(args.seeds).values()
    paths = [path for place in places for path in place.exported_models(args.categories)]
    with workspace.lock_with(places):
        for path, known in exported_thresholds.change(
            paths, args.set_threshold, args.set_false_positive_rate
        ):
            print(f"{path}: threshold {known['threshold']:.6g}, {known['threshold_words']}")


def export_and_evaluate(
    category: layouts.Category,
    workspace: Workspace,
    args: argparse.Namespace,
    chosen: settings.Settings,
    device: str,
) -> dict | None:
    """What the evaluation came to; None without good test images."""
    category = replace(category)  # a copy, which takes its lists of files with it when it goes
    path = workspace.exported_model(category.name, args.format, args.precision)
    if not args.inference_only:
        # Always from the newest artefacts: nothing to skip or resume here.
        with exporters.replacing(path) as new:
            reference = {"torch": export_torch, "onnx": export_onnx, "openvino": export_openvino}[
                args.format
            ](category, workspace, new, args, chosen, device)
            accept(new, reference, category, device)
        print(f"{category.name}: wrote {path}")
    files.require(path, f"export_model.py --format {args.format} --precision {args.precision}")
    engine = open_model(path, device)
    if not args.inference_only:
        exported_thresholds.write_beside(path, engine.metadata)
    exporters.require_category(engine.metadata, category.name, path)
    if not category.tested:
        print(f"{category.name}: there are no good test images, so nothing to evaluate")
        return None
    return evaluate(category, engine, workspace, args)


def export_torch(
    category: layouts.Category,
    workspace: Workspace,
    path: Path,
    args: argparse.Namespace,
    chosen: settings.Settings,
    device: str,
) -> TorchEngine:
    """Write the model; returns it in fp32, as all of these do."""
    view, fusion = view_of(category, chosen), chosen.fusion
    weights, weighed = weighing.decide(category, workspace, fusion, view, args.seed, device)
    state = fused_state(category, workspace, fusion, view, args.precision, weights, weighed, chosen.names)
    files.write_state(path, state)
    return TorchEngine(state, "cpu", "fp32")


def export_onnx(
    category: layouts.Category,
    workspace: Workspace,
    path: Path,
    args: argparse.Namespace,
    chosen: settings.Settings,
    device: str,
) -> TorchEngine:
    source = files.require(workspace.exported_model(category.name, "torch"), "export_model.py --format torch")
    state = files.read_state(source)
    exporters.require_category(metadata(state), category.name, source)
    require_up_to_date(metadata(state), category.name, workspace, source, "torch")
    reference = TorchEngine(state, "cpu", "fp32")
    if args.precision != "int8":
        content = exporters.onnx_model(state, category.name, args.precision, args.with_map, args.raw_input)
    else:
        plain = exporters.onnx_model(state, category.name, "fp32", args.with_map, args.raw_input)
        known = OnnxEngine(plain, device).metadata
        calibration = calibration_images(category, known)

        def build(kept: tuple[str, ...]) -> tuple[bytes, Engine]:
            quantised = exporters.with_metadata(
                exporters.int8_onnx(plain, calibration, kept), known | {"precision": "int8"}
            )
            return quantised, OnnxEngine(quantised, device)

        content, noted = choose_int8(build, category, reference, chosen, args.seed)
        content = exporters.with_metadata(
            content, known | noted | {"networks": exporters.networks_of(content)}
        )
    files.write_bytes(path, content)
    return reference


def export_openvino(
    category: layouts.Category,
    workspace: Workspace,
    path: Path,
    args: argparse.Namespace,
    chosen: settings.Settings,
    device: str,
) -> TorchEngine:
    source = files.require(workspace.exported_model(category.name, "onnx"), "export_model.py --format onnx")
    known = OnnxEngine(source.read_bytes(), device).metadata
    exporters.require_category(known, category.name, source)
    require_up_to_date(known, category.name, workspace, source, "onnx")
    for option in ("with_map", "raw_input"):
        if getattr(args, option) and not known[option]:
            raise UserError(
                f"{source} was exported without --{option}; run export_model.py --format onnx --{option} first"
            )
    torch_model = files.require(
        workspace.exported_model(category.name, "torch"), "export_model.py --format torch"
    )
    reference = TorchEngine(files.read_state(torch_model), "cpu", "fp32")
    if reference.metadata.get("weights") != known.get("weights"):
        raise UserError(f"{source} was not made from {torch_model}; run export_model.py --format onnx first")
    known.pop("networks", None)  # the ONNX model's; OpenVINO itself says in which precision each layer runs
    model = exporters.openvino_model(source.read_bytes(), args.precision)
    noted: dict[str, Any] = {"precision": args.precision}
    if args.precision == "int8":
        calibration, plain = calibration_images(category, known), model

        def build(kept: tuple[str, ...]) -> tuple[object, Engine]:
            quantised = exporters.int8_openvino(plain, calibration, kept)
            exporters.note_metadata(quantised, known | {"precision": "int8"})
            return quantised, OpenVinoEngine(quantised)

        model, noted = choose_int8(build, category, reference, chosen, args.seed)
    exporters.write_openvino(model, path, known | noted)
    return reference


def accept(path: Path, reference: TorchEngine, category: layouts.Category, device: str) -> None:
    """Compare a written export with PyTorch on validation images, and note in it the threshold that follows from its own scores.

    Raises:
        UserError: it gives other scores than PyTorch, or some that are not finite.
    """
    paths = category.validation
    compared = agreement.spread_evenly(len(paths))
    found = fresh_process.score(path, paths, compared, device, f"{category.name}: score validation images")
    known = {"networks": found.networks} | found.metadata
    # First, as it is the stages that are to be trained again where PyTorch's scores are not finite, either.
    known = exported_thresholds.with_validation_scores(known, found.scores, category.name)
    exactly = known.get("precision", "fp32") == "fp32" and found.device.startswith("cpu")
    if problem := agreement.disagreement(reference, [paths[index] for index in compared], found, exactly):
        raise UserError(
            f"{category.name}: the new {path.name} does not give PyTorch's scores of {len(compared)} validation "
            f"images, so it is not kept and an earlier one stays as it is: {problem}"
        )
    exported_thresholds.write_metadata(path, known)


def calibration_images(category: layouts.Category, known: dict[str, Any]) -> np.ndarray:
    """Training images, evenly spread over the sorted list, as the model takes them."""
    paths = category.train
    spread = paths[:: math.ceil(len(paths) / CALIBRATION_IMAGES)]
    views = images.read_views(
        spread, known["input_size"], f"{category.name}: read training images", known.get("white_level")
    )
    return as_input(views, known)


def choose_int8(
    build, category: layouts.Category, fp32: Engine, chosen: settings.Settings, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Quantise as much as agrees with fp32; returns the model and what its metadata should say."""
    check = make_check(category, fp32, chosen, seed)
    model, kept, moved = quantisation.quantise(build, check, lambda line: print(f"{category.name}: {line}"))
    if not moved.suffices:
        raise UserError(
            f"{category.name}: int8 changes the scores more than it should ({moved}), so the model is not exported "
            "and an earlier one stays as it is; take another --precision"
        )
    return model, {"precision": "int8", "kept_in_higher_precision": kept, "agreement": moved._asdict()}


def make_check(
    category: layouts.Category, fp32: Engine, chosen: settings.Settings, seed: int
) -> quantisation.Check:
    """Validation images, and one anomaly made from each by logical synthesis, with their fp32 scores."""
    good = read_for(fp32, category.validation, f"{category.name}: read validation images")
    rng = np.random.default_rng(seed)
    made, scores = [], []
    for image in good:
        found = fp32.predict(image[None])
        scores.append(found.score)
        planted = with_a_part_too_many(image, found.label_map[0], rng, chosen)
        if planted is not None:
            made.append(planted)
    say_left_out(category, len(good) - len(made), len(good))
    scores += [fp32.score(image[None]) for image in made]
    pictures = np.concatenate([good, *(image[None] for image in made)])
    return quantisation.Check(pictures, np.concatenate(scores), np.arange(len(pictures)) < len(good))


def with_a_part_too_many(
    image: np.ndarray, label_map: np.ndarray, rng: np.random.Generator, chosen: settings.Settings
) -> np.ndarray | None:
    """A logical anomaly made from a good image (3, S, S) by logical synthesis, or two; None where nothing could be pasted.

    Args:
        label_map: of the image, (256, 256).
    """
    factor = image.shape[-1] // images.SIZE
    label_map = np.kron(label_map, np.ones((factor, factor), np.uint8))
    # Anywhere in the image will do: here a component that hangs in the air is an anomaly like any other.
    anywhere = np.zeros(label_map.shape, dtype=bool)
    synthesis = synthesise(
        image.transpose(1, 2, 0),
        label_map,
        label_parts(label_map),
        anywhere,
        rng,
        chosen.segmentor.paste_distance,
    )
    return synthesis.image.transpose(2, 0, 1) if synthesis.pasted else None


def say_left_out(category: layouts.Category, count: int, of: int) -> None:
    if count:
        print(
            f"{category.name}: in {count} of {of} pictures no component could be pasted elsewhere; they are left out "
            "of the made anomalies"
        )


def evaluate(
    category: layouts.Category, engine: Engine, workspace: Workspace, args: argparse.Namespace
) -> dict:
    """Score every test image one by one, as a production line would; write the CSV and the JSON beside it.

    Raises:
        UserError: a score is not finite.
    """
    rows, seconds, preparing = [], [], []
    scores: dict[str, list[float]] = {split: [] for split in layouts.SPLITS}
    for split, path in ProgressBar(
        category.test_images, desc=f"{category.name}: evaluate {engine.runtime}", unit="image"
    ):
        start = time.perf_counter()
        image = read_for(engine, [path])
        between = time.perf_counter()
        score = float(engine.score(image)[0])
        seconds.append(time.perf_counter() - between)
        preparing.append(between - start)
        if not math.isfinite(score):
            raise UserError(
                f"{category.name}: the {engine.runtime} model gives {path.name} a score that is not finite; "
                "export it again"
            )
        scores[split].append(score)
        rows.append((path.relative_to(category.root).as_posix(), split, repr(score)))

    good = np.array(scores[layouts.GOOD])
    logical, structural = (
        auroc(good, np.array(scores[split])) for split in (layouts.LOGICAL, layouts.STRUCTURAL)
    )
    target = workspace.evaluation(category.name, args.format, args.precision)
    report = {
        "category": category.name,
        "format": args.format,
        "precision": args.precision,
        "runtime": engine.runtime,
        "ran_in": engine.precision,
        "networks": engine.networks,
        "branches": engine.branches,
        "auroc_logical": logical,
        "auroc_structural": structural,
        "auroc_mean": mean_known([logical, structural]),
        "ms_per_image": _median_ms(seconds),
        "preprocessing_ms": _median_ms(preparing),
        "largest_difference": largest_difference(rows, engine, workspace, category.name, args),
        "kept_in_higher_precision": engine.metadata.get("kept_in_higher_precision", []),
        "images": len(rows),
        "dataset": category.root.resolve().parent.name,
        "device": engine.device,
        "stand_ins": engine.metadata.get("stand_ins", []),
        "chosen_on_test": engine.metadata.get("chosen_on_test", []),
    }

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("image", "split", "score"))
    writer.writerows((files.to_csv_text(image), split, score) for image, split, score in rows)
    files.write_text(target, table.getvalue())
    files.write_json(target.with_suffix(".json"), report | {"model": engine.metadata})
    return report


def largest_difference(
    rows: list[tuple[str, str, str]],
    engine: Engine,
    workspace: Workspace,
    category: str,
    args: argparse.Namespace,
) -> float | None:
    """Of any score from the torch fp32 model's, or None where that model, or its evaluation, is not at hand."""
    if (args.format, args.precision) == ("torch", "fp32"):
        return 0.0
    reference = workspace.evaluation(category, "torch")
    if not reference.exists() or not reference.with_suffix(".json").exists():
        return None
    evaluated = files.read_json(reference.with_suffix(".json"), keys={"model": dict})["model"]
    if any(evaluated.get(key) != engine.metadata.get(key) for key in ("weights", "branch_weights")):
        return None  # the torch model was made anew and not evaluated since, or the other way round
    expected = files.read_scores(reference)
    return max(
        (abs(float(score) - expected[image]) for image, _, score in rows if image in expected), default=None
    )


def _median_ms(seconds: list[float]) -> float:
    return 1000 * float(np.median(seconds[WARM_UP:] or seconds))


if __name__ == "__main__":
    run_script(main)
