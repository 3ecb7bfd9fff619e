"""How many training images it takes: image AUROC of each branch and of the weighted sum with 10, 20, 50, ... of them.

    python -m benchmarks.few_images --dataset_root datasets/synthetic_loco --categories pushpins

For each number and draw, training images are drawn at random (of one draw, the smaller sets are part of the larger) and
linked into a data set of their own; validation and test images are all that there are. Every stage then runs anew
in a process of its own, with the draw for a seed. A number over what a category has stands for all it has.
Writes few_images.json to --output (benchmarks.results plots it); the same command continues where it stopped. A stage
that refuses so few images is named in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.cli import logical_defects
from csad.data import data_sets, files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.evaluation.scores import FUSED
from csad.progress import ProgressBar

import numpy as np

from benchmarks import all_stages
from benchmarks.measuring import describe_machine, markdown, options_of

IMAGES, DRAWS = (10, 20, 50, 100, 200), 3
KINDS = ("logical", "structural")
TITLES = {branch: row.title for branch, row in BRANCHES.items()} | {FUSED: FUSED}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--dataset_root", type=files.path_argument, required=True)
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--output", type=files.path_argument, default=Path("few_images"), help="where to write"
    )
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES), help="for training")
    parser.add_argument("--draws", type=int, default=DRAWS)
    args, stage_options = parser.parse_known_args()
    if min(*args.images, args.draws) < 1:
        raise UserError("--images and --draws have to be at least 1")
    logical = logical_defects(args.preset)
    categories = data_sets.Dataset(args.dataset_root).select(args.categories, logical)
    runs = [
        (category, count, draw)
        for category in categories
        for count in sorted({min(count, len(category.train)) for count in args.images})
        for draw in range(args.draws)
    ]
    rows = []
    with Workspace(args.output).lock():
        for category, count, draw in ProgressBar(runs, desc="few images", unit="run"):
            options = ["--preset", args.preset, "--seed", draw, *stage_options]
            rows.append(measure(category, count, draw, args.output, options))
            content = {
                "rows": rows,
                "dataset": args.dataset_root.name,
                "preset": args.preset,
                "draws": args.draws,
                "machine": describe_machine(),
            }
            files.write_json(args.output / "few_images.json", content)
    print("\n".join(table(rows)))


def measure(
    category: layouts.Category, count: int, draw: int, output: Path, options: Sequence[object]
) -> dict[str, Any]:
    """Image AUROC by branch and kind after all stages on a subset, or why there is none."""
    name = f"{count}_{draw}"
    data, workspace = output / "data" / name, output / "runs" / name
    link_subset(category, data / category.name, count, draw)
    row: dict[str, Any] = {"category": category.name, "images": count, "draw": draw}
    try:
        all_stages.run(
            category.name, workspace, ["--dataset_root", data, "--categories", category.name, *options]
        )
    except UserError as problem:
        row["failed"] = reason(workspace, category.name) or str(problem)
        ProgressBar.write(f"{category.name}, {count} images, draw {draw}: {row['failed']}")
        return row
    detection = all_stages.metrics(category.name, workspace)["detection"]
    row["aurocs"] = {
        branch: {kind: detection[branch][kind]["auroc"] for kind in KINDS}
        for branch in TITLES
        if branch in detection
    }
    stages = all_stages.read(workspace)[category.name]
    return row | {"training_seconds": all_stages.training_seconds(stages)}


def link_subset(category: layouts.Category, folder: Path, count: int, draw: int) -> None:
    """A category's folder with `count` of its training images and everything else, by links; once made it stays.

    Args:
        draw: another one draws other images; the first `count` of one order are taken.
    """
    if folder.exists():
        return
    order = np.random.default_rng(draw).permutation(len(category.train))
    drawn = [category.train[index] for index in sorted(order[:count])]
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    for part, paths in (("train", drawn), ("validation", category.validation)):
        target = unfinished / part / category.convention.good
        target.mkdir(parents=True, exist_ok=True)
        for path in paths:
            link(path, target / f"{category.key(path)}{path.suffix}")
    for name in ("test", "ground_truth", "defects_config.json", "roi.png"):
        if (category.root / name).exists():
            link(category.root / name, unfinished / name)
    unfinished.rename(folder)


def link(source: Path, target: Path) -> None:
    if not target.is_symlink():
        target.symlink_to(source.resolve())


def reason(workspace: Path, category: str) -> str | None:
    """What the stage that failed last said to its user."""
    logs = sorted((workspace / "logs").glob(f"{category}_*.txt"), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    return next((line.partition("error: ")[2] for line in reversed(lines) if "error: " in line), None)


def spread(rows: list[dict[str, Any]], branch: str, kind: str) -> tuple[float, float] | None:
    """Mean and standard deviation (divisor n - 1; 0 of a single one) over rows; None where none has it."""
    values = [row["aurocs"][branch][kind] for row in rows if branch in row.get("aurocs", {})]
    values = [value for value in values if value is not None and np.isfinite(value)]
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: mean and standard deviation over the draws, logical / structural."""
    lines = []
    for category, count in dict.fromkeys((row["category"], row["images"]) for row in rows):
        of_count = [row for row in rows if (row["category"], row["images"]) == (category, count)]
        failed = [row["failed"] for row in of_count if "failed" in row]
        note = f" ({len(failed)} of {len(of_count)} failed: {failed[0]})" if failed else ""
        spreads = [[spread(of_count, branch, kind) for kind in KINDS] for branch in TITLES]
        cells = [" / ".join(f"{s[0]:.1f} ± {s[1]:.1f}" if s else "-" for s in by_kind) for by_kind in spreads]
        lines.append([category, f"{count}{note}", *cells])
    return markdown(["category", "training images", *TITLES.values()], lines)


if __name__ == "__main__":
    run_script(main)
