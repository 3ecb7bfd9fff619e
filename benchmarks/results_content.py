"""What docs/results/*.json keep of what the benchmarks left, and how it is rendered into docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.cli import logical_defects
from csad.data import data_sets, files, layouts
from csad.data.workspace import Workspace
from csad.evaluation.branch_weights import describe
from csad.evaluation.metrics import mean_known
from csad.evaluation.scores import FUSED, SPLIT_OF_PART, by_split

import numpy as np

from benchmarks import all_stages, few_images

KINDS = ("logical", "structural")
RATES = np.linspace(0, 1, 41)  # false-positive rates at which ROC curves are averaged
TITLES = {branch: row.title for branch, row in BRANCHES.items()} | {FUSED: "fused"}


# What is kept of what they left


def detection(dataset: Path, workspaces: dict[int, Path]) -> dict[str, Any]:
    """AUROCs by seed, category, branch and kind; localisation, weights, seconds, and ROC curves of the first seed."""
    content: dict[str, Any] = {"aurocs": {}, "localisation": {}, "weights": {}, "seconds": {}}
    for seed, workspace in workspaces.items():
        timings = all_stages.read(workspace)
        measured = {category: all_stages.metrics(category, workspace) for category in timings}
        content["aurocs"][str(seed)] = {
            category: {
                name: {kind: aurocs[kind]["auroc"] for kind in KINDS}
                for name, aurocs in metrics["detection"].items()
                if name in BRANCHES or name == FUSED
            }
            for category, metrics in measured.items()
        }
        content["localisation"][str(seed)] = {
            category: {kind: figures(metrics["localisation"][FUSED][kind]) for kind in KINDS}
            for category, metrics in measured.items()
        }
        content["weights"][str(seed)] = {category: row["weights"] for category, row in measured.items()}
        content["seconds"][str(seed)] = {
            category: {stage: usage["seconds"] for stage, usage in of_category.items()}
            for category, of_category in timings.items()
        }
    first = next(iter(workspaces.values()))
    return content | {"false_positive_rates": RATES.tolist(), "roc": roc(dataset, first)}


def figures(localisation: dict[str, Any]) -> dict[str, float | None]:
    """sPRO 0.05 and pixel AUROC; None where they were not measured."""
    return {
        "spro": localisation.get("spro", {}).get("0.05"),
        "pixel_auroc": localisation.get("pixel_auroc"),
    }


def roc(dataset: Path, workspace: Path) -> dict[str, dict[str, list[float]]]:
    """True-positive rates at `RATES`, mean over the categories, by branch and kind."""
    curves: dict[str, dict[str, list[np.ndarray]]] = {}
    logical = logical_defects("quick")
    for category in data_sets.Dataset(dataset).select(list(all_stages.read(workspace)), logical):
        for name, scores in scores_by_split(category, Workspace(workspace)).items():
            for kind, split in zip(KINDS, SPLIT_OF_PART.values()):
                if len(scores[split]):
                    curve = true_positive_rates(scores[layouts.GOOD], scores[split])
                    curves.setdefault(name, {}).setdefault(kind, []).append(curve)
    return {
        name: {kind: np.mean(of_kind, axis=0).round(5).tolist() for kind, of_kind in by_kind.items()}
        for name, by_kind in curves.items()
    }


def scores_by_split(category: layouts.Category, workspace: Workspace) -> dict[str, dict[str, np.ndarray]]:
    """Raw scores of each branch, and the torch model's."""
    found = {}
    for branch in BRANCHES:
        if workspace.scores(category.name, branch, "logi").exists():
            parts = {
                part: files.read_array(workspace.scores(category.name, branch, part))
                for part in SPLIT_OF_PART
            }
            found[branch] = by_split(category, parts)
    by_image = files.read_scores(workspace.evaluation(category.name, "torch"))
    found[FUSED] = {
        split: np.array(
            [by_image[path.relative_to(category.root).as_posix()] for path in category.test(split)]
        )
        for split in layouts.SPLITS
    }
    return found


def true_positive_rates(good: np.ndarray, anomalous: np.ndarray) -> np.ndarray:
    """At `RATES`, interpolated between the curve's corners; equal scores make a slope."""
    thresholds = np.unique(np.r_[good, anomalous])[::-1]
    false_positives = np.r_[0, [(good >= threshold).mean() for threshold in thresholds]]
    true_positives = np.r_[0, [(anomalous >= threshold).mean() for threshold in thresholds]]
    # Of several corners at one rate the highest: interpolation takes the last of equal x.
    return np.interp(RATES, false_positives, true_positives)


# Markdown


def row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(cells: Sequence[str]) -> list[str]:
    return [row(cells), "|" + "---|" * len(cells)]


def percent(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.1f}"


def both(by_kind: dict[str, float | None]) -> str:
    return " / ".join(percent(by_kind[kind]) for kind in KINDS)


def render_detection(content: dict[str, Any]) -> list[str]:
    """AUROC of each branch and the sum in each category, of the first seed; several seeds' averages; localisation; time."""
    seeds = list(content["aurocs"])
    first = content["aurocs"][seeds[0]]
    names = [name for name in TITLES if any(name in by_name for by_name in first.values())]
    lines = [f"Image AUROC in percent, logical / structural, seed {seeds[0]}:", ""]
    lines += header(["category", *(TITLES[name] for name in names), "weights"])
    for category, by_name in first.items():
        cells = [both(by_name[name]) if name in by_name else "" for name in names]
        lines.append(row([category, *cells, describe(content["weights"][seeds[0]][category])]))
    if len(first) > 1:
        lines.append(row(["average", *(both(average(first, name)) for name in names), ""]))
    if len(seeds) > 1:
        lines += [
            "",
            f"Average of the categories, mean ± standard deviation over seeds {', '.join(seeds)}:",
            "",
        ]
        lines += header(["", *(TITLES[name] for name in names)])
        lines.append(row(["average", *(over_seeds(content["aurocs"].values(), name) for name in names)]))
    return lines + ["", *render_localisation(content), "", *render_seconds(content)]


def render_localisation(content: dict[str, Any]) -> list[str]:
    lines = ["Localisation by the fused map, in percent, logical / structural:", ""]
    lines += header(["category", "sPRO 0.05", "pixel AUROC"])
    measured = next(iter(content["localisation"].values()))
    columns = ("spro", "pixel_auroc")
    by_column = {
        category: {column: {kind: by_kind[kind][column] for kind in KINDS} for column in columns}
        for category, by_kind in measured.items()
    }
    lines += [row([category, *map(both, cells.values())]) for category, cells in by_column.items()]
    if len(by_column) > 1:
        lines.append(row(["average", *(both(average(by_column, column)) for column in columns)]))
    return lines


def render_seconds(content: dict[str, Any]) -> list[str]:
    """Of the first seed."""
    seconds = next(iter(content["seconds"].values()))
    lines = ["Seconds of each stage, in a process of its own:", ""]
    lines += header(["category", *all_stages.TITLES.values()])
    for category, stages in seconds.items():
        lines.append(
            row(
                [
                    category,
                    *(f"{stages[stage]:.0f}" if stage in stages else "" for stage in all_stages.TITLES),
                ]
            )
        )
    return lines


def average(by_category: dict[str, Any], name: str) -> dict[str, float]:
    """Of a branch over the categories that have it, by kind; what was not measured does not count."""
    values = [by_name[name] for by_name in by_category.values() if name in by_name]
    return {kind: mean_known(value[kind] for value in values) for kind in KINDS}


def over_seeds(runs: Iterable[dict[str, Any]], name: str) -> str:
    """Of a branch, logical / structural, the mean and standard deviation (divisor n - 1) of the runs' averages."""
    averages = [average(by_category, name) for by_category in runs]
    values = [[by_kind[kind] for by_kind in averages] for kind in KINDS]
    return " / ".join(
        f"{np.mean(of_kind):.1f} ± {np.std(of_kind, ddof=1):.1f}" if np.isfinite(of_kind).all() else "-"
        for of_kind in values
    )


def render_peers(content: dict[str, Any]) -> list[str]:
    """One line per method: AUROC in each category, and the mean of everything else over the categories."""
    rows = content["rows"]
    categories = list(dict.fromkeys(entry["category"] for entry in rows))
    batches = sorted({int(batch) for entry in rows for batch in entry.get("ms_per_image", {})})
    lines = [
        "Image AUROC in percent, logical / structural; pixel AUROC and the rest are means over the categories:",
        "",
    ]
    lines += header(
        [
            "method",
            *categories,
            *(["average"] if len(categories) > 1 else []),
            "pixel AUROC",
            "training s",
            "peak MB",
        ]
        + [f"ms, batch {batch}" for batch in batches]
    )
    for method in dict.fromkeys(entry["method"] for entry in rows):
        of_method = {entry["category"]: entry for entry in rows if entry["method"] == method}
        aurocs = {
            category: {kind: entry.get(f"auroc_{kind}") for kind in KINDS}
            for category, entry in of_method.items()
        }
        cells = [both(aurocs[category]) if category in aurocs else "-" for category in categories]
        if len(categories) > 1:
            cells.append(both({kind: mean_known(value[kind] for value in aurocs.values()) for kind in KINDS}))
        entries = list(of_method.values())
        cells.append(
            both({kind: mean_known(entry.get(f"pixel_auroc_{kind}") for entry in entries) for kind in KINDS})
        )
        cells += [
            whole(mean_known(entry.get(key) for entry in entries)) for key in ("training_seconds", "peak_mb")
        ]
        milliseconds = [
            [entry.get("ms_per_image", {}).get(str(batch)) for entry in entries] for batch in batches
        ]
        cells += [whole(mean_known(values)) for values in milliseconds]
        lines.append(row([title(entries), *cells]))
    failures = dict.fromkeys(entry["title"] + ": " + entry["failed"] for entry in rows if "failed" in entry)
    return lines + [""] * bool(failures) + [f"Failed: {failure}" for failure in failures]


def title(entries: Sequence[dict[str, Any]]) -> str:
    """Of a method; ours by the branches of all categories and the runtime."""
    first = entries[0]
    if not first["ours"]:
        return f"anomalib: {first['title']}"
    branches = {branch for entry in entries for branch in entry["branches"]}
    alone = TITLES[next(iter(branches))] if len(branches) == 1 else "fused"
    return f"CSAD, {alone}, {first['format']} {first['precision']}"


def whole(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "-"


def render_few_images(content: dict[str, Any]) -> list[str]:
    counted = f"Image AUROC in percent, logical / structural, mean and standard deviation over {content['draws']} draws:"
    return [counted, "", *few_images.table(content["rows"])]


def render_speed(content: dict[str, Any]) -> list[str]:
    """Milliseconds per picture, one line per runtime and precision."""
    rows = content["results"]
    batches = sorted({entry["batch"] for entry in rows})
    columns = [(graph, batch) for graph in ("ours", "published") for batch in batches]
    lines = [
        f"Milliseconds per picture of {content['model']}, median of {content['turns']} rounds, in turns:",
        "",
    ]
    names = {"ours": "ours", "published": "the published graph's form"}
    lines += header(["runtime", "precision", *(f"{names[graph]}, batch {batch}" for graph, batch in columns)])
    for runtime, precision in dict.fromkeys((entry["runtime"], entry["precision"]) for entry in rows):
        milliseconds = {
            (entry["graph"], entry["batch"]): entry["ms_per_image"]
            for entry in rows
            if (entry["runtime"], entry["precision"]) == (runtime, precision)
        }
        lines.append(
            row([runtime, precision, *(whole(milliseconds.get(column, np.nan)) for column in columns)])
        )
    return lines


def render_training_speed(content: dict[str, Any]) -> list[str]:
    lines = ["One step of the published training, batches and networks of preset paper:", ""]
    lines += header(
        ["stage", "step", "ms", "times as fast as the plain one", "hours for all steps", "memory MiB"]
    )
    for stage, report in content.items():
        for name, figures_of in report["variants"].items():
            memory = figures_of["step_memory_mib"]
            cells = [f"{figures_of['times_plain']:.2f}", f"{figures_of['hours_of_preset']:.1f}"]
            cells.append("-" if memory is None else f"{memory:.0f}")
            lines.append(row([stage, name, f"{figures_of['ms_per_step']:.0f}", *cells]))
    return lines
