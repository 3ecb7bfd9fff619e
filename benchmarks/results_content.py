"""What docs/results/*.json keep of what the benchmarks left, and how it is rendered into docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from sklearn.metrics import roc_curve

from benchmarks import all_stages, few_images
from benchmarks.few_images import KINDS, TITLES
from benchmarks.measuring import markdown

RATES = np.linspace(0, 1, 41)  # false-positive rates at which ROC curves are averaged


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
        content["seconds"][str(seed)] = all_stages.seconds(timings)
    first = next(iter(workspaces.values()))
    return content | {"false_positive_rates": RATES.tolist(), "roc": roc(dataset, first)}


def figures(localisation: dict[str, Any]) -> dict[str, float | None]:
    """sPRO 0.05 and pixel AUROC; None where they were not measured."""
    return {"spro": localisation.get("spro", {}).get("0.05"), "pixel_auroc": localisation.get("pixel_auroc")}


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
    labels = np.repeat([0, 1], [len(good), len(anomalous)])
    false_positives, true_positives, _ = roc_curve(labels, np.r_[good, anomalous])
    # Of several corners at one rate the highest: interpolation takes the last of equal x.
    return np.interp(RATES, false_positives, true_positives)


# Markdown


def percent(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.1f}"


def both(by_kind: Mapping[str, float | None]) -> str:
    return " / ".join(percent(by_kind[kind]) for kind in KINDS)


def render_detection(content: dict[str, Any]) -> list[str]:
    """AUROC of each branch and the sum in each category, of the first seed; several seeds' averages; localisation; time."""
    seeds = list(content["aurocs"])
    first = content["aurocs"][seeds[0]]
    names = [name for name in TITLES if any(name in by_name for by_name in first.values())]
    titles = [TITLES[name] for name in names]
    rows = [
        [category, *(both(by_name[name]) if name in by_name else "" for name in names)]
        + [describe(content["weights"][seeds[0]][category])]
        for category, by_name in first.items()
    ]
    if len(first) > 1:
        rows.append(["average", *(both(average(first, name)) for name in names), ""])
    lines = [f"Image AUROC in percent, logical / structural, seed {seeds[0]}:", ""]
    lines += markdown(["category", *titles, "weights"], rows)
    fused = mean_known([value for by_name in first.values() for value in by_name[FUSED].values()])
    lines += ["", f"Fused, mean of both kinds: {percent(fused)}."]
    if len(seeds) > 1:
        averages = ["average", *(over_seeds(content["aurocs"].values(), name) for name in names)]
        over = f"Average of the categories, mean ± standard deviation over seeds {', '.join(seeds)}:"
        lines += ["", over, "", *markdown(["", *titles], [averages])]
    lines += ["", "Localisation by the fused map, in percent, logical / structural:", ""]
    lines += render_localisation(content["localisation"][seeds[0]])
    lines += ["", "Seconds of each stage, in a process of its own:", ""]
    return lines + all_stages.table(content["seconds"][seeds[0]])


def render_localisation(by_category: dict[str, Any]) -> list[str]:
    columns = {"spro": "sPRO 0.05", "pixel_auroc": "pixel AUROC"}
    by_column = {
        category: {column: {kind: by_kind[kind][column] for kind in KINDS} for column in columns}
        for category, by_kind in by_category.items()
    }
    rows = [[category, *map(both, cells.values())] for category, cells in by_column.items()]
    if len(by_column) > 1:
        rows.append(["average", *(both(average(by_column, column)) for column in columns)])
    return markdown(["category", *columns.values()], rows)


def average(by_category: dict[str, Any], name: str) -> dict[str, float]:
    """Of a branch over the categories that have it, by kind."""
    return mean_by_kind(by_name[name] for by_name in by_category.values() if name in by_name)


def mean_by_kind(rows: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """What was not measured does not count."""
    values = list(rows)
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
    head = ["method", *categories, *(["average"] if len(categories) > 1 else [])]
    head += ["pixel AUROC", "training s", "peak MB", *(f"ms, batch {batch}" for batch in batches)]
    lines = []
    for method in dict.fromkeys(entry["method"] for entry in rows):
        entries = [entry for entry in rows if entry["method"] == method]
        by_category = {entry["category"]: values_by_kind(entry, "auroc") for entry in entries}
        cells = [both(by_category[category]) if category in by_category else "-" for category in categories]
        if len(categories) > 1:
            cells.append(both(mean_by_kind(by_category.values())))
        cells.append(both(mean_by_kind(values_by_kind(entry, "pixel_auroc") for entry in entries)))
        numbers = [[entry.get(key) for entry in entries] for key in ("training_seconds", "peak_mb")]
        numbers += [[entry.get("ms_per_image", {}).get(str(batch)) for entry in entries] for batch in batches]
        lines.append([title(entries[0]), *cells, *(whole(mean_known(values)) for values in numbers)])
    failures = dict.fromkeys(entry["title"] + ": " + entry["failed"] for entry in rows if "failed" in entry)
    return [
        "Image AUROC in percent, logical / structural; pixel AUROC and the rest are means over the categories:",
        "",
        *markdown(head, lines),
        *([""] * bool(failures)),
        *(f"Failed: {failure}" for failure in failures),
    ]


def values_by_kind(entry: dict[str, Any], name: str) -> dict[str, float | None]:
    return {kind: entry.get(f"{name}_{kind}") for kind in KINDS}


def title(row: dict[str, Any]) -> str:
    """Of a method; ours by the branch, if it is one alone, and the runtime."""
    if not row["ours"]:
        return f"anomalib: {row['title']}"
    return f"CSAD, {TITLES[row['alone'] or FUSED]}, {row['format']} {row['precision']}"


def whole(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "-"


def render_few_images(content: dict[str, Any]) -> list[str]:
    counted = f"Image AUROC in percent, logical / structural, mean and standard deviation over {content['draws']} draws:"
    return [counted, "", *few_images.table(content["rows"])]


def render_speed(content: dict[str, Any]) -> list[str]:
    """Milliseconds per picture, one line per runtime and precision."""
    milliseconds = {
        (row["runtime"], row["precision"], row["graph"], row["batch"]): row["ms_per_image"]
        for row in content["results"]
    }
    batches = sorted({row["batch"] for row in content["results"]})
    graphs = {"ours": "ours", "published": "the published graph's form"}
    columns = [(graph, batch) for graph in graphs for batch in batches]
    rows = [
        [*engine, *(whole(milliseconds.get((*engine, *column), np.nan)) for column in columns)]
        for engine in dict.fromkeys((row["runtime"], row["precision"]) for row in content["results"])
    ]
    head = ["runtime", "precision", *(f"{graphs[graph]}, batch {batch}" for graph, batch in columns)]
    model, turns = content["model"], content["turns"]
    first = f"Milliseconds per picture of {model}, median of {turns} rounds, in turns:"
    return [first, "", *markdown(head, rows)]


def render_training_speed(content: dict[str, Any]) -> list[str]:
    rows = []
    for stage, report in content.items():
        for name, figures_of in report["variants"].items():
            memory = figures_of["step_memory_mib"]
            cells = [f"{figures_of['times_plain']:.2f}", f"{figures_of['hours_of_preset']:.1f}"]
            cells.append("-" if memory is None else f"{memory:.0f}")
            rows.append([stage, name, f"{figures_of['ms_per_step']:.0f}", *cells])
    head = ["stage", "step", "ms", "times as fast as the plain one", "hours for all steps", "memory MiB"]
    first = "One step of the published training, batches and networks of preset paper:"
    return [first, "", *markdown(head, rows)]
