"""What the evaluation of exported models came to, as tables: export_report.json and .md, and in the terminal."""

from __future__ import annotations

from typing import Any

from csad.data import files
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.metrics import counted, mean_known
from csad.evaluation.scores import MANY, reservations
from csad.evaluation.thresholds import threshold_image

from tabulate import tabulate

AUROCS, TIMES = ("auroc_logical", "auroc_structural", "auroc_mean"), ("ms_per_image", "preprocessing_ms")
NUMBER = (int, float)
FIELDS = (
    dict.fromkeys(("category", "format", "precision", "ran_in"), str)
    | {"networks": dict, "stand_ins": list}
    | dict.fromkeys((*AUROCS, "largest_difference"), (*NUMBER, type(None)))
    | dict.fromkeys(TIMES, NUMBER)
)


def read(workspace: Workspace) -> list[dict[str, Any]]:
    """What earlier runs came to; UserError if the file cannot be read, or holds something else."""
    path = workspace.export_report
    reports = files.read_json(path) if path.exists() else []
    if not (isinstance(reports, list) and all(files.holds(report, FIELDS) for report in reports)):
        raise UserError(f"{path} cannot be read (it does not hold a list of evaluations); {files.MAKE_AGAIN}")
    return reports


def write(reports: list[dict[str, Any]], workspace: Workspace) -> None:
    """Print this run's table, and keep it together with those of earlier runs."""
    target, key, earlier = workspace.export_report, ("category", "format", "precision"), read(workspace)
    replaced = {tuple(report[name] for name in key) for report in reports}
    earlier = sorted(
        [report for report in earlier if tuple(report[name] for name in key) not in replaced] + reports,
        key=lambda report: [report[name] for name in key],
    )
    files.write_json(target, earlier)
    files.write_text(target.with_suffix(".md"), "# Exported models\n\n" + table_of(earlier))
    print("\n" + table_of(reports, len(reports) > MANY), end="")


def table_of(reports: list[dict[str, Any]], short: bool = False) -> str:
    """A Markdown table that reads in a terminal, too; of several categories of one format an average, alone if ``short``."""
    rows, notes = [] if short else list(reports), []
    for kind in sorted({(report["format"], report["precision"]) for report in reports}):
        same = [report for report in reports if (report["format"], report["precision"]) == kind]
        if len(same) == 1:
            continue
        differences = [report["largest_difference"] for report in same]
        rows.append(
            {
                "category": "average",
                "format": kind[0],
                "precision": kind[1],
                "ran_in": "/".join(sorted({report["ran_in"] for report in same})),
                "largest_difference": None if None in differences else max(differences),
            }
            | {name: mean_known(report[name] for report in same) for name in AUROCS + TIMES}
        )
        if partial := counted(
            {name.removeprefix("auroc_"): [report[name] for report in same] for name in AUROCS}
        ):
            notes.append(f"\n{' '.join(kind)}: averages of what was measured{partial}")
    columns = ("category", "format", "precision", "ran_in", *AUROCS, *TIMES, "largest_difference")
    titles = [name.removeprefix("auroc_").replace("_per_", "/").replace("_", " ") for name in columns]
    cells = [[_cell(name, report[name]) for name in columns] for report in rows]
    text = [tabulate(cells, titles, tablefmt="github", disable_numparse=True), *notes]
    for report in [] if short else reports:
        if report["precision"] == "int8":
            higher = [f"{name} ({kind})" for name, kind in report["networks"].items() if kind != "int8"]
            text.append(
                f"\n{report['category']}, {report['format']} int8: in higher precision besides label map and score: "
                f"{', '.join(higher) or 'nothing'}"
            )
    for report in [] if short else reports:
        if report.get("threshold_image"):
            text.append(
                f"\n{report['category']}, {report['format']} {report['precision']}: threshold "
                f"{report['threshold']:.4g}, the score of the good picture {report['threshold_image']}"
            )
    text += [f"\n{line}" for line in reservations(reports)]
    return "\n".join(text) + "\n"


def threshold_line(metadata: dict[str, Any]) -> str:
    """What an export says of its threshold, and the picture to look at."""
    text = f"threshold {metadata['threshold']:.4g}, {metadata['threshold_words']}"
    image = threshold_image(metadata)
    if image is None:
        return text
    return (
        f"{text}; it is the score of {image}: look at that picture, and if it is not a good one, take it out and "
        "run the stages again"
    )


def _cell(name: str, value: Any) -> str:
    if name == "largest_difference":
        return "not known" if value is None else f"{value:.2g}"
    if name.startswith("auroc"):
        return f"{mean_known([value]):.3f}"  # null is NaN
    return f"{value:.2f}" if name in TIMES else value
