"""Stage 4: fuse everything into one deployable model per category, and evaluate it.

``--format torch`` puts the fused branches and their normalisations together into ckpt/pytorch_models/{category}.pth, a
state dict with the published keys. ``--format onnx`` folds that model into ckpt/onnx_models/{category}.onnx, and
``--format openvino`` turns this into ckpt/openvino_models/{category}.xml and .bin; another ``--precision`` than fp32 is
in the file's name. Before a new file takes the old one's place a process of its own opens it and scores the validation images:
its threshold is from there, and scores or maps that are not PyTorch's end the export (csad.export.agreement). Then, and alone
with ``--inference_only``, every test image is scored: scores, AUROCs, milliseconds and the largest difference from the torch
fp32 model go to anomaly_score/, export_report.json and export_report.md.
"""

from __future__ import annotations

import argparse
from functools import partial

from csad.cli import common_options, select, with_branches, with_cluster, with_seeds
from csad.data import files
from csad.data.workspace import FORMATS, PRECISIONS, Workspace
from csad.errors import UserError, run_script
from csad.evaluation import export_tables, seeds
from csad.export import exported_thresholds, exporters
from csad.export.agreement import accept
from csad.export.exported_scores import evaluate
from csad.export.formats import ExportJob, export
from csad.inference.runtimes import open_model
from csad.training.jobs import Task, run_jobs
from csad.training.stage import job_name

from models.device import choose_device

IMPOSSIBLE = {
    ("torch", "int8"): "PyTorch has no int8 here; use --format onnx or --format openvino",
    ("onnx", "bf16"): "onnxruntime has no bf16 kernels for CPUs; use --format torch, --format openvino, or "
    "--precision fp16",
}


def main() -> None:
    parser = with_cluster(with_branches(with_seeds(common_options(__doc__))))
    parser.add_argument(
        "--format", default="torch", choices=FORMATS, help=f"of the exported model: {', '.join(FORMATS)}"
    )
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
        help="the same, so that this fraction of good images may lie over it (exports begin with 0.01)",
    )
    args = parser.parse_args()
    if args.set_threshold is not None or args.set_false_positive_rate is not None:
        return change_thresholds(args)
    if (args.format, args.precision) in IMPOSSIBLE:
        raise UserError(IMPOSSIBLE[args.format, args.precision])
    if args.format == "torch" and (args.with_map or args.raw_input):
        raise UserError(
            "--with_map and --raw_input are for --format onnx and openvino; a torch model always has maps"
        )
    run_jobs(args, jobs, partial(summarise, args))


def jobs(args: argparse.Namespace) -> dict[str, Task]:
    workspace, _, categories, settings_of = select(args)
    device, tasks = str(choose_device(args.device)), {}
    workspaces = workspace.of_seeds(args.seeds)
    for seed_workspace in workspaces.values():
        export_tables.read(seed_workspace)  # what is wrong with it should not come out after all the work
    for seed, seed_workspace in workspaces.items():
        own_args = argparse.Namespace(**vars(args) | ({} if seed is None else {"seed": seed}))
        for category in categories:
            job = ExportJob(category, seed_workspace, settings_of[category.name], own_args, device)
            tasks[job_name(category, seed)] = Task(category, seed, partial(export_and_evaluate, job))
    return tasks


def export_and_evaluate(job: ExportJob) -> dict | None:
    """What the evaluation came to; None without good test images."""
    category, workspace, args = job.category, job.workspace, job.args
    path = workspace.exported_model(category.name, args.format, args.precision)
    if not args.inference_only:
        # Always from the newest artefacts: nothing to skip or resume here.
        with exporters.replacing(path) as new:
            accept(new, export(job, new), category, job.device)
        print(f"{category.name}: wrote {path}")
    files.require(path, f"export_model.py --format {args.format} --precision {args.precision}")
    engine = open_model(path, job.device)
    if not args.inference_only:
        exported_thresholds.write_beside(path, engine.metadata)
        print(f"{category.name}: {export_tables.threshold_line(engine.metadata)}")
    exporters.require_category(engine.metadata, category.name, path)
    if not category.tested:
        print(f"{category.name}: there are no good test images, so nothing to evaluate")
        return None
    return evaluate(category, engine, workspace, args.format, args.precision)


def summarise(args: argparse.Namespace, results: dict[str, dict | None]) -> None:
    """Write the table of each seed, and that over all seeds."""
    workspace, _, categories, _ = select(args)
    figures = (*export_tables.AUROCS, "ms_per_image")
    runs = []
    for seed, seed_workspace in workspace.of_seeds(args.seeds).items():
        reports = [report for category in categories if (report := results.get(job_name(category, seed)))]
        if reports:
            export_tables.write(reports, seed_workspace)
        runs.append({report["category"]: {name: report[name] for name in figures} for report in reports})
    # Where jobs failed, averages over other categories in each seed would say nothing.
    if args.seeds and runs[0] and all(run.keys() == runs[0].keys() for run in runs):
        lines = seeds.table(seeds.over_seeds(runs), args.seeds)
        target = workspace.over_seeds(f"export_report_{args.format}_{args.precision}")
        files.write_text(target, "\n".join(lines) + "\n")
        print("\n" + "\n".join(lines))


def change_thresholds(args: argparse.Namespace) -> None:
    if args.set_threshold is not None and len(args.categories or []) != 1:
        raise UserError(
            "--set_threshold is for one category, as the scores of several have different scales; name it with "
            "--categories, or take --set_false_positive_rate"
        )
    workspaces = (workspace := Workspace(args.workspace)).of_seeds(args.seeds).values()
    paths = [path for each in workspaces for path in each.exported_models(args.categories)]
    with workspace.lock_with(workspaces):
        changed = exported_thresholds.change(paths, args.set_threshold, args.set_false_positive_rate)
        for path, metadata in changed:
            print(f"{path}: threshold {metadata['threshold']:.6g}, {metadata['threshold_words']}")


if __name__ == "__main__":
    run_script(main)
