"""What stage 5 measured as text: score_combine_result.txt and, of many categories, what the terminal shows of it."""

from __future__ import annotations

from typing import Any

from csad.evaluation import branch_weights, spro
from csad.evaluation.measures import ANOMALIES
from csad.evaluation.metrics import LOCO, counted, mean_known
from csad.evaluation.scores import FUSED, MANY, fused_mean, lowest_first, reservations

from tabulate import tabulate

PUBLISHED = "published CSAD on MVTec LOCO AD: average 95.3 (paper), 95.6 (repository)"


def by_category(measured: dict[str, dict]) -> list[str]:
    """The lines of score_combine_result.txt that docs/method.md section 4 fixes."""
    lines = []
    for name, content in measured.items():
        lines.append(f"{name.upper()}:")
        for branches, aurocs in content["detection"].items():
            lines.append(
                f"{tuple(branches.split('+'))} AUC: {aurocs['logical']['auroc']:.3f} {aurocs['structural']['auroc']:.3f}"
            )
    return lines


def overview(measured: dict[str, dict], with_published: bool = True) -> list[str]:
    """What concerns all categories together; of many, the lowest by name.

    Args:
        with_published: published figures stand below categories of MVTec LOCO AD's names; not if others bear these.
    """
    contents = list(measured.values())
    lines = ["", f"data set: {contents[0]['dataset']}"]
    for branches in contents[0]["detection"]:
        if all(branches in content["detection"] for content in contents):
            detections = [content["detection"][branches] for content in contents]
            lines.append(average(str(tuple(branches.split("+"))), detections))
    by_weights: dict[str, list[str]] = {}
    for content in contents:
        weights = f"{branch_weights.describe(content['weights'])} ({content['rule']})"
        by_weights.setdefault(weights, []).append(content["category"])
    lines += [
        f"fused: {text}" + (f" in {', '.join(names)}" if len(by_weights) > 1 else "")
        for text, names in by_weights.items()
    ]
    if len(by_weights) > 1:
        lines.append(average("of what is fused", [content["detection"][FUSED] for content in contents]))
    lines += [
        f"{content['category']}: {content['undecided']}" for content in contents if content["undecided"]
    ]
    lines += reservations(contents)
    if with_published and LOCO & {content["category"] for content in contents}:
        lines.append(PUBLISHED)
    if len(contents) > MANY:
        title = f"the lowest {MANY} of {len(contents)} categories, fused branches, image AUROC in percent"
        rows = []
        for content in lowest_first(contents)[:MANY]:
            aurocs = [metrics["auroc"] for metrics in content["detection"][FUSED].values()]
            rows.append((content["category"], *aurocs, fused_mean(content)))
        lines += _table(title, rows, ("", *ANOMALIES, "mean"))
    return lines


def average(title: str, detections: list[dict[str, dict[str, float]]]) -> str:
    """A line with the mean image AUROC over categories."""
    values = {kind: [metrics[kind]["auroc"] for metrics in detections] for kind in ANOMALIES}
    logical, structural = map(mean_known, values.values())
    return (
        f"average {title} logical {logical:.3f} structural {structural:.3f} mean {mean_known([logical, structural]):.3f}"
        + counted(values)
    )


def details(measured: dict[str, dict]) -> list[str]:
    """Further metrics of each category."""
    rows: list[tuple[Any, ...]] = [
        (name, kind, *(metrics[metric] for metric in ("average_precision", "f1_max")))
        for name, content in measured.items()
        for kind, metrics in content["detection"][FUSED].items()
    ]
    title = "image level, fused branches, in percent"
    lines = _table(title, rows, ("", "", "average precision", "F1-max"))

    rows = [
        (name, entry["kind"], defect, entry["images"], entry["auroc"][FUSED])
        for name, content in measured.items()
        for defect, entry in content["defects"].items()
    ]
    if rows:
        title = "single defects, fused branches, image AUROC in percent"
        lines += _table(title, rows, ("", "", "defect", "images", "AUROC"))

    title = (
        "localisation by the fused branches' maps, in percent (sPRO: area under the saturated per-region overlap up to "
        "this false-positive rate)"
    )
    rows, notes = [], []
    for name, content in measured.items():
        incomplete, general = [], []
        for kind, metrics in content["localisation"][FUSED].items():
            if "missing" in metrics:
                continue
            rows.append(
                (name, kind, metrics["pixel_auroc"], metrics["pixel_f1_max"], *metrics["spro"].values())
            )
            if without := ", ".join(metrics["left_out"]):
                incomplete.append(
                    f"{name}, {kind}: measured without {without}, which has no ground-truth masks"
                )
            if metrics["note"]:
                general.append(f"{name}: {metrics['note']}")
        notes += [*unmeasured({name: content}), *incomplete, *dict.fromkeys(general)]
    means: list[tuple[Any, ...]] = [
        ("average", kind, *_mean_columns([row[2:] for row in rows if row[1] == kind]))
        for kind in ANOMALIES
        if any(row[1] == kind for row in rows)
    ]
    if means:
        means.append(("average", "mean", *_mean_columns([row[2:] for row in means])))
        measured_of = {
            kind: [any(row[:2] == (name, kind) for row in rows) or None for name in measured]
            for kind in ANOMALIES
        }
        if partial := counted(measured_of):
            notes.append(f"averages of the categories that were measured{partial}")
    columns = ("", "", "pixel AUROC", "pixel F1-max", *(f"sPRO {limit}" for limit in spro.FPR_LIMITS))
    return [*lines, *_table(title, [*rows, *means], columns), *notes]


def unmeasured(measured: dict[str, dict]) -> list[str]:
    """Where localisation could not be measured, and why."""
    return [
        f"{name}, {kind}: not measured: {metrics['missing']}"
        for name, content in measured.items()
        for kind, metrics in content["localisation"][FUSED].items()
        if "missing" in metrics
    ]


def _mean_columns(rows: list[tuple[float, ...]]) -> list[float]:
    return [mean_known(column) for column in zip(*rows)]


def _table(title: str, rows: list[tuple], columns: tuple[str, ...]) -> list[str]:
    table = tabulate(rows, columns, tablefmt="plain", floatfmt=".3f").splitlines() if rows else []
    return ["", title, *table]
