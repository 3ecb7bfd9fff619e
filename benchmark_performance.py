"""Stage 5: fuse the scores of the branches and report how well they detect and localise.

Reads anomaly_score/{category}_{patchhist,LGST,memory,DFM}_{logi,struc,val}_score.npy, the branches' maps and the ground truth.
Writes score_combine_result.txt: for each category one line per branch, the published sum, that of all at
equal weights and the fused one, logical then structural image AUROC in percent; everything else (averages,
stand-ins, average precision, F1-max, single defects, pixel metrics and saturated per-region overlap) stands
on lines of its own. The same numbers per category: anomaly_score/{category}_metrics.json.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from csad import settings
from csad.branches import BRANCHES, PAPER_BRANCHES
from csad.cli import common_options, select, with_branches, with_seeds
from csad.data import files, layouts, records
from csad.data.defects import DefectNames
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.evaluation import branch_weights, localisation, seeds
from csad.evaluation.metrics import LOCO, auroc, average_precision, counted, f1_max, mean_known
from csad.evaluation.scores import (
    FUSED,
    MANY,
    Scores,
    by_split,
    chosen_on_test,
    digest_scores,
    fused_mean,
    has_map,
    lowest_first,
    normalised_scores,
    said_of_choice,
    scored_branches,
)
from csad.progress import ProgressBar

import numpy as np
from tabulate import tabulate

from models.constants import SIZE
from models.fusion import fuse

NO_COMPONENT_MAP = (
    "the patch histogram has no map, as the exported model has none without --segmentor.evidence"
)
PUBLISHED = "published CSAD on MVTec LOCO AD: average 95.3 (paper), 95.6 (repository)"
ANOMALIES = {split.removesuffix("_anomalies"): split for split in (layouts.LOGICAL, layouts.STRUCTURAL)}


def main() -> None:
    args = with_branches(with_seeds(common_options(__doc__))).parse_args()
    workspace, _, categories, chosen = select(args)
    places = workspace.of_seeds(args.seeds).values()
    with workspace.lock_with(places):
        runs, missing = [], []
        for place in places:
            runs.append({})
            # Copies, which take their lists of files with them when they go.
            for category in ProgressBar(
                map(replace, categories), "measure", len(categories), unit="category", leave=False
            ):
                if not category.tested:
                    missing.append(f"{category.name}: nothing to measure, there are no good test images")
                    continue
                runs[-1][category.name] = measure(category, place, chosen[category.name])
            if not runs[-1]:
                raise UserError("; ".join(missing) + "; export_model.py and predict.py need none")
            for name, content in runs[-1].items():
                files.write_json(place.metrics(name), content)
            target, lines = (
                place.combined_scores,
                [*by_category(runs[-1]), *overview(runs[-1]), *details(runs[-1]), *missing],
            )
            files.write_text(target, "\n".join(lines) + "\n")
            if len(runs[-1]) > MANY:
                lines = overview(runs[-1])
        if args.seeds:
            target, lines = workspace.over_seeds(target.stem), seeds.table(seeds.over_seeds(runs), args.seeds)
            if stand_ins := used_by_any(runs):
                lines.append(
                    f"made with stand-ins: {', '.join(stand_ins)}; not comparable with published figures"
                )
            lines += said_of_choice(
                branch for run in runs for content in run.values() for branch in content["chosen_on_test"]
            )
            files.write_text(target, "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {target}")


def measure(category: layouts.Category, workspace: Workspace, chosen: settings.Settings) -> dict[str, Any]:
    """Everything there is to measure about one category."""
    (weights, undecided), rule = (
        branch_weights.read(category.name, workspace, chosen.fusion),
        chosen.fusion.rule,
    )
    if undecided:
        ProgressBar.write(f"{category.name}: {undecided}", file=sys.stderr)
    fused = list(weights)
    roi = read_roi(category, SIZE, chosen.roi)
    branches = scored_branches(category, workspace, fused)
    scores = normalised_scores(category, workspace, branches, rule)
    sums = {
        name: fused_by_split(category, scores, of_branches, rule)
        for name, of_branches in (equal_sums(branches) | {FUSED: weights}).items()
    }
    return {
        "category": category.name,
        "dataset": category.root.resolve().parent.name,
        "fused": fused,
        "rule": rule,
        "undecided": undecided,
        "weights": weights,
        "stand_ins": sorted(used_stand_ins(category.name, workspace, branches)),
        "chosen_on_test": chosen_on_test(category.name, workspace, branches),
        "measured": digest_scores(category, workspace, branches),
        "detection": {name: detection(split_scores) for name, split_scores in sums.items()},
        "defects": single_defects(category, sums),
        "localisation": {
            name: where(category, workspace, sum_weights, roi)
            for name, sum_weights in (
                {branch: {branch: 1.0} for branch in branches} | {FUSED: weights}
            ).items()
        },
    }


def equal_sums(branches: list[str]) -> dict[str, dict[str, float]]:
    """Which plain sums are measured besides the weighted one: the published three first, further branches, all of them."""
    paper = [branch for branch in branches if branch in PAPER_BRANCHES]
    sums = [*([branch] for branch in paper), paper, *([branch] for branch in branches), branches]
    return {"+".join(some): dict.fromkeys(some, 1.0) for some in sums if some}


def used_by_any(runs: list[dict[str, dict]]) -> list[str]:
    return sorted({name for run in runs for content in run.values() for name in content["stand_ins"]})


def detection(split_scores: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Image-level metrics of a sum of branches' scores, logical and structural apart."""
    good = split_scores[layouts.GOOD]
    return {
        name: {
            "auroc": auroc(good, split_scores[split]),
            "average_precision": average_precision(good, split_scores[split]),
            "f1_max": f1_max(good, split_scores[split]),
        }
        for name, split in ANOMALIES.items()
    }


def fused_by_split(
    category: layouts.Category, scores: Scores, weights: dict[str, float], rule: str
) -> dict[str, np.ndarray]:
    parts = {
        part: fuse({branch: scores[branch][part] for branch in weights}, weights, rule)
        for part in scores[next(iter(weights))]
    }
    return by_split(category, parts)


def single_defects(
    category: layouts.Category, sums: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Image AUROC of each defect whose images are known by name, against all good images."""
    found: dict[str, dict[str, Any]] = {}
    defect_names = DefectNames(category)
    named = {
        kind: [defect_names.of(split, path) for path in category.test(split)]
        for kind, split in ANOMALIES.items()
    }
    of_both_kinds = set(named["logical"]) & set(named["structural"])
    for kind, names in named.items():
        for name in sorted({name for name in names if name}):
            chosen = np.array([one == name for one in names])
            found[f"{kind} {name}" if name in of_both_kinds else name] = {
                "kind": kind,
                "images": int(chosen.sum()),
                "auroc": {
                    name: auroc(split_scores[layouts.GOOD], split_scores[ANOMALIES[kind]][chosen])
                    for name, split_scores in sums.items()
                },
            }
    return found


def where(
    category: layouts.Category, workspace: Workspace, weights: dict[str, float], roi: np.ndarray | None
) -> dict[str, dict]:
    """Localisation by the branches' maps, logical and structural apart; {"missing": why} where it cannot be measured."""
    branches = list(weights)
    drawing = [branch for branch in branches if has_map(category, workspace, branch)]
    if not drawing:
        return {name: {"missing": NO_COMPONENT_MAP} for name in ANOMALIES}
    for branch in drawing:
        path = workspace.anomaly_maps(category.name, branch)
        if not path.exists():
            why = f"{path.relative_to(workspace.root)} is missing; {BRANCHES[branch].stage} adds it without training again"
            return {name: {"missing": why} for name in ANOMALIES}
    by_branch = {
        branch: localisation.read_maps(workspace.anomaly_maps(category.name, branch)) for branch in drawing
    }
    for branch in set(branches) - set(drawing):  # as in the exported model
        by_branch[branch] = {split: np.zeros_like(values) for split, values in by_branch[drawing[0]].items()}
    maps = localisation.fused_maps(by_branch, weights)
    found = {}
    for name, split in ANOMALIES.items():
        try:
            if not category.test(split):
                raise UserError(f"{category.name} has no {name} test images")
            measured = localisation.measure(category, maps, split, roi)
            found[name] = {
                "spro": {str(limit): area for limit, area in measured.spro.items()},
                "pixel_auroc": measured.pixel_auroc,
                "pixel_f1_max": measured.pixel_f1_max,
                "left_out": sorted(localisation.without_masks(category, split)),
                "note": NO_COMPONENT_MAP if len(drawing) < len(branches) else "",
            }
        except UserError as problem:  # image-level figures are worth having without it
            # Metrics and report go to other people, whose folders are others.
            found[name] = {
                "missing": str(problem)
                .replace(f"{category.root.parent}/", "")
                .replace(f"{workspace.root}/", "")
            }
    return found


def by_category(measured: dict[str, dict]) -> list[str]:
    """The lines of score_combine_result.txt that docs/method.md section 4 fixes."""
    lines = []
    for name, content in measured.items():
        lines.append(f"{name.upper()}:")
        for branches, found in content["detection"].items():
            lines.append(
                f"{tuple(branches.split('+'))} AUC: {found['logical']['auroc']:.3f} {found['structural']['auroc']:.3f}"
            )
    return lines


def overview(measured: dict[str, dict]) -> list[str]:
    """What concerns all categories together; of many, the lowest by name."""
    contents = list(measured.values())
    lines = ["", f"data set: {contents[0]['dataset']}"]
    for branches in [
        one for one in contents[0]["detection"] if all(one in content["detection"] for content in contents)
    ]:
        lines.append(
            average(str(tuple(branches.split("+"))), [content["detection"][branches] for content in contents])
        )
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
    if stand_ins := used_by_any([measured]):
        lines.append(f"made with stand-ins: {', '.join(stand_ins)}; not comparable with published figures")
    lines += said_of_choice(branch for content in contents for branch in content["chosen_on_test"])
    if LOCO & {content["category"] for content in contents}:
        lines.append(PUBLISHED)
    if len(contents) > MANY:
        lines += [
            "",
            f"the lowest {MANY} of {len(contents)} categories, fused branches, image AUROC in percent",
            *_table(
                [
                    (
                        one["category"],
                        *(found["auroc"] for found in one["detection"][FUSED].values()),
                        fused_mean(one),
                    )
                    for one in lowest_first(contents)[:MANY]
                ],
                ("", *ANOMALIES, "mean"),
            ),
        ]
    return lines


def average(title: str, detections: list[dict[str, dict[str, float]]]) -> str:
    """A line with the mean image AUROC over categories."""
    values = {kind: [one[kind]["auroc"] for one in detections] for kind in ANOMALIES}
    logical, structural = map(mean_known, values.values())
    return (
        f"average {title} logical {logical:.3f} structural {structural:.3f} mean {mean_known([logical, structural]):.3f}"
        + counted(values)
    )


def details(measured: dict[str, dict]) -> list[str]:
    """Further metrics of each category."""
    rows = [
        (name, kind, *(found[metric] for metric in ("average_precision", "f1_max")))
        for name, content in measured.items()
        for kind, found in content["detection"][FUSED].items()
    ]
    lines = [
        "",
        "image level, fused branches, in percent",
        *_table(rows, ("", "", "average precision", "F1-max")),
    ]

    rows = [
        (name, entry["kind"], defect, entry["images"], entry["auroc"][FUSED])
        for name, content in measured.items()
        for defect, entry in content["defects"].items()
    ]
    if rows:
        lines += [
            "",
            "single defects, fused branches, image AUROC in percent",
            *_table(rows, ("", "", "defect", "images", "AUROC")),
        ]

    lines += [
        "",
        "localisation by the fused branches' maps, in percent (sPRO: area under the saturated per-region overlap up to "
        "this false-positive rate)",
    ]
    rows, notes = [], []
    for name, content in measured.items():
        found = content["localisation"][FUSED]
        rows += [
            (name, kind, one["pixel_auroc"], one["pixel_f1_max"], *one["spro"].values())
            for kind, one in found.items()
            if "spro" in one
        ]
        notes += [
            f"{name}, {kind}: not measured: {one['missing']}"
            for kind, one in found.items()
            if "missing" in one
        ]
        notes += [
            f"{name}, {kind}: measured without {', '.join(one['left_out'])}, which has no ground-truth masks"
            for kind, one in found.items()
            if one.get("left_out")
        ]
        notes += [
            f"{name}: {note}" for note in {one["note"]: None for one in found.values() if one.get("note")}
        ]
    means = [
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
        if told := counted(measured_of):
            notes.append(f"averages of the categories that were measured{told}")
    columns = ("", "", "pixel AUROC", "pixel F1-max", *(f"sPRO {limit}" for limit in localisation.FPR_LIMITS))
    return [*lines, *(_table([*rows, *means], columns) if rows else []), *notes]


def _mean_columns(rows: list[tuple[float, ...]]) -> list[float]:
    return [mean_known(column) for column in zip(*rows)]


def _table(rows: list[tuple], columns: tuple[str, ...]) -> list[str]:
    return tabulate(rows, columns, tablefmt="plain", floatfmt=".3f").splitlines()


def used_stand_ins(category: str, workspace: Workspace, branches: list[str]) -> set[str]:
    """Stand-ins noted in the records beside the checkpoints; files made elsewhere have none."""
    recorded = [workspace.record(category, branch) for branch in branches]
    return {
        name for path in recorded if path.exists() for name in records.read_record(path)["used"]["stand_ins"]
    }


if __name__ == "__main__":
    run_script(main)
