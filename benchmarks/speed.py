"""Latency and throughput: the published graph against ours, side by side, in every runtime, precision and batch size.

The published graph is `models.fused.FusedModel`, written from docs/method.md operation by operation; ours are the files that
export_model.py makes, run by the engines that predict.py uses. Weights are random, at the size of the paper, unless
--model names a torch model: they do not change the speed. All variants take turns, so that whatever else the machine does
hits all of them alike, and the median of the turns counts.

Writes speed.json and benchmark_speed.svg (images per second against mean AUROC, of a --model whose category
export_report.json knows) to --workspace.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from csad.data import files, images
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script

import numpy as np
import torch
from tabulate import tabulate

from benchmarks.measuring import describe_machine, in_turns, options_of, seconds_of
from benchmarks.speed_variants import COMPILED, FORMAT_OF, PUBLISHED_GRAPH, Variant, build_variants
from models.backbone import PUBLISHED, empty_encoder
from models.device import choose_device
from models.fused import FusedModel, metadata, published_state
from models.lgst import LGST
from models.patch_histogram import PatchHistogramDetector
from models.segmentor import Segmentor

PAPER_SIZE = {"width": 256, "classes": 7, "student": 512, "channels": 512}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument(
        "--workspace", type=Path, default=Path("."), help="where to write; its export_report.json is read"
    )
    parser.add_argument(
        "--model", type=Path, help="a torch model, published or ours (default: random, paper size)"
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=[
            runtime for runtime in FORMAT_OF if runtime != COMPILED
        ],  # it needs a C++ compiler, and minutes
        choices=list(FORMAT_OF),
    )
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16", "int8"], choices=["fp32", "fp16", "bf16", "int8"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=7, help="timed runs of each variant and batch size")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    if min(args.batches) < 1 or args.turns < 1:
        raise UserError("--batches and --turns have to be at least 1")
    device = str(choose_device(args.device))
    workspace = Workspace(args.workspace)
    reports = files.read_json(workspace.export_report) if workspace.export_report.exists() else []
    state = files.read_state(args.model) if args.model else random_state()

    with tempfile.TemporaryDirectory() as folder:
        variants = build_variants(state, args, device, reports, Path(folder))
        seconds = measure(variants, args.batches, args.turns, metadata(state).get("input_size", images.SIZE))
    # Random weights have no AUROC, and that of another model is not theirs.
    category = metadata(state).get("category")
    rows = results(variants, seconds, [report for report in reports if report["category"] == category])
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    content = {
        "results": rows,
        "machine": describe_machine(device),
        "model": str(args.model.name if args.model else "random, paper size"),
        "turns": args.turns,
    }
    with workspace.lock():
        files.write_json(workspace.root / "speed.json", content)
        draw(rows, workspace.root / "benchmark_speed.svg")


def random_state() -> dict:
    """A fused model of the paper's size with random weights, in the published format."""
    torch.manual_seed(0)
    encoder = empty_encoder(PUBLISHED)
    return published_state(
        FusedModel(
            encoder,
            Segmentor(encoder.channels, PAPER_SIZE["width"], PAPER_SIZE["classes"]),
            PatchHistogramDetector(PAPER_SIZE["classes"]),
            LGST(encoder.channels, PAPER_SIZE["student"], PAPER_SIZE["channels"]),
        )
    )


def measure(
    variants: list[Variant], batches: list[int], turns: int, side: int
) -> dict[int, list[list[float]]]:
    """Seconds of each turn of each variant by batch size, of images with `side` pixels a side."""
    rng, seconds = np.random.default_rng(1), {}
    for size in batches:
        batch = rng.integers(0, 256, (size, 3, side, side), dtype=np.uint8)
        runs = [seconds_of(partial(variant.run, batch)) for variant in variants]
        seconds[size] = in_turns(runs, turns, f"batch {size}")
    return seconds


def results(
    variants: list[Variant], seconds: dict[int, list[list[float]]], reports: list[dict]
) -> list[dict]:
    """One row per variant and batch size; speed-ups are over the published graph in torch fp32, image by image."""
    rows: list[dict[str, Any]] = []
    for number, variant in enumerate(variants):
        evaluated_in = "fp32" if variant.graph == PUBLISHED_GRAPH else variant.precision
        aurocs = [
            report["auroc_mean"]
            for report in reports
            if report["auroc_mean"] is not None
            and (report["format"], report["precision"]) == (FORMAT_OF[variant.runtime], evaluated_in)
        ]
        for size, of_variants in seconds.items():
            milliseconds = 1000 * float(np.median(of_variants[number])) / size
            rows.append(
                {
                    "graph": variant.graph,
                    "runtime": variant.runtime,
                    "precision": variant.precision,
                    "ran_in": variant.ran_in,
                    "batch": size,
                    "ms_per_image": milliseconds,
                    "images_per_second": 1000 / milliseconds,
                    "auroc_mean": float(np.mean(aurocs))
                    if aurocs and variant.precision == evaluated_in
                    else None,
                }
            )
    base = {
        row["batch"]: row["ms_per_image"]
        for row in rows
        if (row["graph"], row["runtime"], row["precision"]) == (PUBLISHED_GRAPH, "torch", "fp32")
    }
    for row in rows:
        row["speed_up"] = base[row["batch"]] / row["ms_per_image"] if row["batch"] in base else None
    return rows


def draw(rows: list[dict], target: Path) -> None:
    """Speed at the smallest batch against mean AUROC, one mark per variant that has been evaluated."""
    smallest = min(row["batch"] for row in rows)
    evaluated = [row for row in rows if row["batch"] == smallest and row["auroc_mean"] is not None]
    if not evaluated:
        print(
            f"{target.name} is not drawn: no AUROC is known; name a --model that export_model.py has evaluated in this "
            "workspace"
        )
        return
    from benchmarks import results_plots  # matplotlib is needed for nothing else

    files.write_bytes(target, results_plots.speeds(evaluated))
    print(f"wrote {target}")


if __name__ == "__main__":
    run_script(main)
