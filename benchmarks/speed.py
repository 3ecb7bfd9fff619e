"""Latency and throughput: the published graph against ours, side by side, in every runtime, precision and batch size.

The published graph is `models.fused.FusedModel`, written from docs/method.md operation by operation; ours are the files that
export_model.py makes, run by the engines that predict.py uses. Weights are random, at the size of the paper, unless
--model names a torch model: they do not change the speed. All variants take turns, so that whatever else the machine does
hits all of them alike, and the median of the turns counts.

Writes speed.json and benchmark_speed.svg (latency against mean AUROC, of a --model whose category export_report.json
knows) to --workspace.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from csad.data import files, images
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.export import exporters
from csad.export.assembly import versions
from csad.export.quantisation import FALLBACK_ORDER
from csad.inference.engines import Engine, OnnxEngine, TorchEngine, as_input, open_model
from csad.progress import ProgressBar

import numpy as np
import torch

from models.backbone import PUBLISHED, empty_encoder
from models.device import choose_device
from models.fused import FusedModel, attach_metadata, from_state, metadata, published_state
from models.lgst import LGST
from models.patch_histogram import PatchHistogramDetector
from models.segmentor import Segmentor

FORMAT_OF = {"torch": "torch", "onnxruntime": "onnx", "openvino": "openvino"}
PUBLISHED_GRAPH, OURS = "published", "ours"
CALIBRATION_IMAGES = 4  # of noise; for the speed of int8 it is enough that every layer has a range
PAPER_SIZE = {"width": 256, "classes": 7, "student": 512, "channels": 512}


@dataclass
class Variant:
    """One graph in one runtime and precision; `run` takes (B, 3, size, size) uint8 and waits for the scores."""

    graph: str
    runtime: str
    precision: str
    ran_in: str
    run: Callable[[np.ndarray], np.ndarray]
    seconds: dict[int, list[float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workspace", type=Path, default=Path("."), help="where to write; its export_report.json is read"
    )
    parser.add_argument(
        "--model", type=Path, help="a torch model, published or ours (default: random, paper size)"
    )
    parser.add_argument("--runtimes", nargs="+", default=list(FORMAT_OF), choices=list(FORMAT_OF))
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
        measure(variants, args.batches, args.turns, metadata(state).get("input_size", images.SIZE))
    # Random weights have no AUROC, and that of another model is not theirs.
    category = metadata(state).get("category")
    rows = results(variants, [one for one in reports if one["category"] == category])
    print(table(rows), end="")
    with workspace.lock():
        files.write_json(
            workspace.root / "speed.json",
            {
                "results": rows,
                "machine": machine(device),
                "model": str(args.model.name if args.model else "random, paper size"),
                "turns": args.turns,
                "versions": versions(),
            },
        )
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


def build_variants(
    state: dict, args: argparse.Namespace, device: str, reports: list[dict], folder: Path
) -> list[Variant]:
    """Both graphs in every runtime and precision asked for; ours as exported files."""
    variants = []
    category = metadata(state).get("category", "random")
    model = from_state(state)
    known = {
        "category": category,
        "with_map": False,
        "raw_input": False,
        "precision": "fp32",
        "input_size": model.size,
    }
    rng = np.random.default_rng(0)
    noise = as_input(
        rng.integers(0, 256, (CALIBRATION_IMAGES, 3, model.size, model.size), dtype=np.uint8), known
    )
    paths = {}
    if {"onnxruntime", "openvino"} & set(args.runtimes):
        contents = {
            PUBLISHED_GRAPH: exporters.to_onnx(model, known, ("score",)),
            OURS: exporters.onnx_model(state, category, "fp32", with_map=False, raw_input=False),
        }
        for graph, content in contents.items():
            paths[graph] = folder / f"{graph}.onnx"
            paths[graph].write_bytes(content)
    networks = {PUBLISHED_GRAPH: ("/",), OURS: exporters.NETWORKS}

    for precision in args.precisions:
        if "torch" in args.runtimes and precision != "int8":
            published = PublishedTorch(model, precision, device)
            variants.append(Variant(PUBLISHED_GRAPH, "torch", precision, published.precision, published))
            asked = published_state(model)
            attach_metadata(asked, metadata(state) | {"precision": precision})
            engine = TorchEngine(asked, device)
            variants.append(Variant(OURS, "torch", precision, engine.precision, engine.score))
        for runtime in ("onnxruntime", "openvino"):
            if runtime not in args.runtimes or (runtime, precision) == ("onnxruntime", "bf16"):
                continue
            for graph in (PUBLISHED_GRAPH, OURS):
                if graph == PUBLISHED_GRAPH and precision == "int8" and model.memory is not None:
                    continue  # quantised as a whole it does not run; with a patch memory nothing was published, either
                kept = kept_parts(reports, FORMAT_OF[runtime]) if graph == OURS else ()
                engine = other_engine(
                    runtime, precision, paths[graph], known, noise, kept, networks[graph], device
                )
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
    precision: str,
    path: Path,
    known: dict,
    calibration: np.ndarray,
    kept: tuple[str, ...],
    networks: tuple[str, ...],
    device: str,
) -> Engine:
    """A graph in ONNX, made ready for a runtime and precision the way export_model.py does it."""
    known = known | {"precision": precision}
    if runtime == "onnxruntime":
        content = path.read_bytes()
        if precision == "int8":
            content = exporters.int8_onnx(content, calibration, kept, networks)
        if precision == "fp16":
            content = exporters.half_networks(content)
        return OnnxEngine(exporters.with_metadata(content, known), device)
    model = exporters.openvino_model(path.read_bytes(), precision)
    if precision == "int8":
        model = exporters.int8_openvino(model, calibration, kept, networks)
    target = path.with_suffix(".xml")
    exporters.write_openvino(model, target, known)
    return open_model(target, device)


def kept_parts(reports: list[dict], format_: str) -> tuple[str, ...]:
    """What int8 left in higher precision for the scores' sake, over all evaluated categories; at least the output layers."""
    names = {FALLBACK_ORDER[0][0]} | {
        name
        for one in reports
        if (one["format"], one["precision"]) == (format_, "int8")
        for name in one["kept_in_higher_precision"]
    }
    return tuple(prefix for name, prefixes in FALLBACK_ORDER if name in names for prefix in prefixes)


def measure(variants: list[Variant], batches: list[int], turns: int, side: int) -> None:
    """Let the variants take turns; one untimed run first."""
    rng = np.random.default_rng(1)
    for size in batches:
        batch = rng.integers(0, 256, (size, 3, side, side), dtype=np.uint8)
        for turn in ProgressBar(range(turns + 1), desc=f"batch {size}", unit="turn"):
            for variant in variants:
                start = time.perf_counter()
                variant.run(batch)
                if turn > 0:
                    variant.seconds.setdefault(size, []).append(time.perf_counter() - start)


def results(variants: list[Variant], reports: list[dict]) -> list[dict]:
    """One row per variant and batch size; speed-ups are over the published graph in torch fp32, image by image."""
    rows = []
    for variant in variants:
        scores = [
            one["auroc_mean"]
            for one in reports
            if one["auroc_mean"] is not None
            and (one["format"], one["precision"])
            == (FORMAT_OF[variant.runtime], "fp32" if variant.graph == PUBLISHED_GRAPH else variant.precision)
        ]
        known = variant.graph == OURS or variant.precision == "fp32"
        for size, seconds in variant.seconds.items():
            milliseconds = 1000 * float(np.median(seconds)) / size
            rows.append(
                {
                    "graph": variant.graph,
                    "runtime": variant.runtime,
                    "precision": variant.precision,
                    "ran_in": variant.ran_in,
                    "batch": size,
                    "ms_per_image": milliseconds,
                    "images_per_second": 1000 / milliseconds,
                    "fastest_ms_per_image": 1000 * min(seconds) / size,
                    "auroc_mean": float(np.mean(scores)) if scores and known else None,
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


def machine(device: str) -> dict:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (
                line.split(":", 1)[1].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| graph | runtime | precision | ran in | batch | ms/image | images/s | speed-up | mean AUROC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed_up = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
        score = "" if row["auroc_mean"] is None else f"{row['auroc_mean']:.2f}"
        lines.append(
            f"| {row['graph']} | {row['runtime']} | {row['precision']} | {row['ran_in']} | {row['batch']} | "
            f"{row['ms_per_image']:.1f} | {row['images_per_second']:.2f} | {speed_up} | {score} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], target: Path) -> None:
    """Latency at the smallest batch against mean AUROC, one mark per variant that has been evaluated."""
    rows = [
        row
        for row in rows
        if row["batch"] == min(row["batch"] for row in rows) and row["auroc_mean"] is not None
    ]
    if not rows:
        print(
            f"{target.name} is not drawn: no AUROC is known; name a --model that export_model.py has evaluated in this "
            "workspace"
        )
        return
    files.write_text(target, scatter(rows))
    print(f"wrote {target}")


def scatter(rows: list[dict]) -> str:
    """The figure as SVG: latency on a logarithmic axis to the right, AUROC upwards, a numbered key beside it."""
    width, height, left, top, right, bottom = 860, 400, 64, 24, 330, 52
    across, up = width - left - right, height - top - bottom
    fastest, slowest = (f(row["ms_per_image"] for row in rows) for f in (min, max))
    low, high = np.log10(fastest / 1.4), np.log10(slowest * 1.4)
    worst, best = (f(row["auroc_mean"] for row in rows) for f in (min, max))
    floor, ceiling = worst - max(0.25, 0.2 * (best - worst)), best + max(0.25, 0.2 * (best - worst))
    colours = {"torch": "#c2410c", "onnxruntime": "#1d4ed8", "openvino": "#15803d"}

    def place(row: dict) -> tuple[float, float]:
        return (
            left + across * (np.log10(row["ms_per_image"]) - low) / (high - low),
            top + up * (ceiling - row["auroc_mean"]) / (ceiling - floor),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="{top}" width="{across}" height="{up}" fill="none" stroke="#888"/>',
    ]
    for value in [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]:
        if low <= np.log10(value) <= high:
            x = left + across * (np.log10(value) - low) / (high - low)
            parts += [
                f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + up}" stroke="#ddd"/>',
                f'<text x="{x:.1f}" y="{top + up + 17}" text-anchor="middle">{value:g}</text>',
            ]
    for value in np.linspace(floor, ceiling, 5)[1:-1]:
        y = top + up * (ceiling - value) / (ceiling - floor)
        parts += [
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + across}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>',
        ]
    parts += [
        f'<text x="{left + across / 2}" y="{height - 12}" text-anchor="middle">ms per image, batch {rows[0]["batch"]}'
        " (logarithmic)</text>",
        f'<text transform="translate(14 {top + up / 2}) rotate(-90)" text-anchor="middle">mean image AUROC, %</text>',
    ]
    for number, row in enumerate(sorted(rows, key=lambda row: row["ms_per_image"]), start=1):
        (x, y), colour = place(row), colours[row["runtime"]]
        fill = colour if row["graph"] == OURS else "white"
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{x:.1f}" y="{y - 11 - 12 * (number % 4):.1f}" text-anchor="middle">{number}</text>',
        ]
        line = top + 8 + 22 * (number - 1)
        parts += [
            f'<circle cx="{width - right + 26}" cy="{line}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{width - right + 40}" y="{line + 4}">{number}  {row["graph"]}, {row["runtime"]} {row["precision"]}: '
            f"{row['ms_per_image']:.0f} ms</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    run_script(main)
