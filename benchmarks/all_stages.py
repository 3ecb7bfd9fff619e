"""All stages of a preset on a data set with stand-ins, each in a process of its own: seconds, processor time, peak memory.

    python -m benchmarks.all_stages --dataset_root datasets/synthetic_loco --workspace stages

Writes all_stages.json to the workspace, for each category what each stage took. The same command continues where it
stopped: a stage that is in that file is not run again. Options that this does not know go to every stage.

With --single_branches the workspace gets a folder for each branch (branch_memory, ...) with models of that branch alone,
made of the same checkpoints: how good and how fast each is without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.cli import logical_defects
from csad.data import data_sets, files
from csad.data.workspace import EXPORTED, Workspace
from csad.errors import run_script
from csad.progress import ProgressBar

from benchmarks.measuring import markdown, measured_script, options_of
from models.backbone import PACKAGED

TRAINING = ("pseudo_label", "train_segmentor", "CSAD", "patch_memory", "export_model")
EVALUATION = "benchmark_performance"
TITLES = {
    "pseudo_label": "1 pseudo-labels",
    "train_segmentor": "2 segmentor",
    "CSAD": "3 LGST",
    "patch_memory": "3b memory, DFM",
    "export_model": "4 export",
    EVALUATION: "5 evaluation",
}
Timings = dict[str, dict[str, dict[str, float]]]  # category -> stage -> Usage's fields


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--dataset_root", type=files.path_argument, required=True)
    parser.add_argument("--workspace", type=files.path_argument, required=True)
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--formats", nargs="+", default=["torch"], choices=list(EXPORTED), help="of the models"
    )
    parser.add_argument("--single_branches", action="store_true", help="also models of each branch alone")
    args, stage_options = parser.parse_known_args()
    logical = logical_defects(args.preset)
    categories = data_sets.Dataset(args.dataset_root).select(args.categories, logical)
    common = ["--preset", args.preset, "--seed", args.seed, *stage_options]
    for category in ProgressBar(categories, desc="all stages", unit="category"):
        names = ["--dataset_root", args.dataset_root, "--categories", category.name, *common]
        run(category.name, args.workspace, names, args.formats)
        if args.single_branches:
            export_branches(category.name, args.workspace, names, args.formats)
    print("\n".join(table(seconds(read(args.workspace)))))


def run(
    category: str, workspace: Path, options: Sequence[object], formats: Sequence[str] = ("torch",)
) -> None:
    """Run what is missing of a category's stages; `options` name it, its data set, preset and seed. UserError
    if a stage failed; its log is {workspace}/logs/{category}_{stage}.txt."""
    for stage in TRAINING:
        more = ["--pseudo_labels.proposer", "classical"] if stage == "pseudo_label" else []
        run_stage(stage, category, workspace, [*options, *more])
    export(category, workspace, options, [name for name in formats if name != "torch"])
    run_stage(EVALUATION, category, workspace, options)


def export(category: str, workspace: Path, options: Sequence[object], formats: Sequence[str]) -> None:
    """Export further models, with maps, as those of `torch` always have them."""
    for name in formats:
        more = ["--format", name] + (["--with_map"] if name != "torch" else [])
        run_stage("export_model", category, workspace, [*options, *more], f"export_model_{name}")


def run_stage(
    script: str, category: str, workspace: Path, options: Sequence[object], name: str | None = None
) -> None:
    """Run a script unless it was run before under this name (default: its own)."""
    timings, key = read(workspace), name or script
    if key in timings.get(category, {}):
        return
    log = workspace / "logs" / f"{category}_{key}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    usage = measured_script(script, workspace, ["--backbone", PACKAGED, *options], log)
    timings.setdefault(category, {})[key] = usage._asdict()
    files.write_json(workspace / "all_stages.json", timings)


def export_branches(
    category: str, workspace: Path, options: Sequence[object], formats: Sequence[str]
) -> None:
    """Models of each branch alone, in workspaces made of links to this one's checkpoints and scores."""
    for branch in BRANCHES:
        if not Workspace(workspace).checkpoint(category, branch).exists():
            continue
        alone = workspace / f"branch_{branch}"
        for folder in ("ckpt", "anomaly_score"):
            link_files(workspace / folder, alone / folder)
        only = ["--branches", branch, "--fusion.optional", "[]"]
        export(category, alone, [*options, *only], formats)


def link_files(source: Path, target: Path) -> None:
    """Link the files, not the folders, of one folder into another; stages replace links, they write through none."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())


def read(workspace: Path) -> Timings:
    path = workspace / "all_stages.json"
    return files.read_json(path) if path.exists() else {}


def training_seconds(timings: dict[str, dict[str, float]]) -> float | None:
    """Of one category, stages 1 to 4 together, starting Python and reading pictures included."""
    return sum(timings[stage]["seconds"] for stage in TRAINING) if set(TRAINING) <= set(timings) else None


def seconds(timings: Timings) -> dict[str, dict[str, float]]:
    """Category -> stage -> seconds."""
    return {
        category: {stage: usage["seconds"] for stage, usage in stages.items()}
        for category, stages in timings.items()
    }


def table(seconds_by_category: dict[str, dict[str, float]]) -> list[str]:
    """Seconds of each stage, in lines of Markdown."""
    rows = [
        [category, *(f"{stages[stage]:.0f}" if stage in stages else "" for stage in TITLES)]
        for category, stages in seconds_by_category.items()
    ]
    return markdown(["category", *TITLES.values()], rows)


def metrics(category: str, workspace: Path) -> dict[str, Any]:
    """What stage 5 measured of a category."""
    return files.read_json(Workspace(workspace).metrics(category))


if __name__ == "__main__":
    run_script(main)
