"""Stage 5: fuse the scores of both branches and report how well they detect and localise.

Reads anomaly_score/{category}_{patchhist,LGST}_{logi,struc,val}_score.npy, {category}_LGST_maps.npz and the ground truth.
Writes score_combine_result.txt: for each category one line per branch and one for both together, logical then structural
image AUROC in percent; everything else (averages, stand-ins, average precision, F1-max, pixel metrics and saturated
per-region overlap) stands on lines of its own. The same numbers per category: anomaly_score/{category}_metrics.json.
"""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
from tqdm import tqdm

import settings
from data import files, layouts
from data.workspace import Workspace
from errors import UserError, run_script
from evaluation import localisation, seeds
from evaluation.metrics import auroc, average_precision, f1_max, mean_known
from evaluation.scores import BRANCHES, PARTS, digest_scores, normalised_scores

COMBINATIONS = tuple(chain.from_iterable(combinations(BRANCHES, size) for size in (1, 2)))
PUBLISHED = "published CSAD on MVTec LOCO AD: average 95.3 (paper), 95.6 (repository)"


ANOMALIES = {kind.removesuffix("_anomalies"): (part, kind) for part, kind in PARTS.items()}


def main() -> None:
    args = settings.with_seeds(settings.command_line(__doc__)).parse_args()
    workspace = Workspace(args.workspace)
    dataset = layouts.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories)
    settings.check((category.name for category in categories), args)
    with workspace.lock():
        runs = []
        for home in workspace.of_seeds(args.seeds).values():
            runs.append(measure(categories, dataset, home))
            for name, content in runs[-1].items():
                files.write_json(home.metrics(name), content)
            target, lines = home.combined_scores, table(runs[-1])
            files.write_text(target, "\n".join(lines) + "\n")
        if args.seeds:
            target, lines = workspace.over_seeds(target.stem), seeds.table(seeds.over_seeds(runs), args.seeds)
            if stand_ins := used_by_any(runs):
                lines.append(f"made with stand-ins: {', '.join(stand_ins)}; not comparable with published figures")
            files.write_text(target, "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {target}")


def measure(categories: list[layouts.Category], dataset: layouts.Dataset, workspace: Workspace) -> dict[str, dict]:
    """Everything there is to measure in one workspace, by category."""
    measured = {}
    for category in tqdm(categories, desc="measure", unit="category", leave=False):
        scores = normalised_scores(category, workspace)
        measured[category.name] = {
            "category": category.name, "dataset": dataset.root.name,
            "stand_ins": sorted(used_stand_ins(category.name, workspace)), "measured": digest_scores(category, workspace),
            "detection": {"+".join(branches): detection(category, [scores[branch] for branch in branches])
                          for branches in COMBINATIONS},
            "localisation": where(category, workspace)}
    return measured


def used_by_any(runs: list[dict[str, dict]]) -> list[str]:
    return sorted({name for run in runs for content in run.values() for name in content["stand_ins"]})


def detection(category: layouts.Category, branches: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Image-level metrics of the sum of the branches' scores, logical and structural apart."""
    good = len(category.test(layouts.GOOD))
    found = {}
    for name, (part, _) in ANOMALIES.items():
        fused = sum(branch[part] for branch in branches)
        found[name] = {"auroc": auroc(fused[:good], fused[good:]),
                       "average_precision": average_precision(fused[:good], fused[good:]),
                       "f1_max": f1_max(fused[:good], fused[good:])}
    return found


def where(category: layouts.Category, workspace: Workspace) -> dict[str, dict]:
    """Localisation by the anomaly maps, logical and structural apart; {"missing": why} where it cannot be measured."""
    path = workspace.anomaly_maps(category.name)
    if not path.exists():
        return {"missing": f"{path.relative_to(workspace.root)} is missing; CSAD.py adds it without training again"}
    maps = files.read_arrays(path)
    try:
        found = {name: localisation.measure(category, maps, kind) for name, (_, kind) in ANOMALIES.items()
                 if category.test(kind)}
    except UserError as problem:  # image-level figures are worth having without it
        return {"missing": str(problem)}
    return {name: {"spro": {str(limit): area for limit, area in measured.spro.items()},
                   "pixel_auroc": measured.pixel_auroc, "pixel_f1_max": measured.pixel_f1_max}
            for name, measured in found.items()}


def table(measured: dict[str, dict]) -> list[str]:
    """The lines of score_combine_result.txt; METHOD.md section 4 fixes those of each category."""
    lines = []
    for name, content in measured.items():
        lines.append(f"{name.upper()}:")
        for branches in COMBINATIONS:
            found = content["detection"]["+".join(branches)]
            lines.append(f"{branches} AUC: {found['logical']['auroc']:.3f} {found['structural']['auroc']:.3f}")

    lines += ["", f"data set: {next(iter(measured.values()))['dataset']}"]
    for branches in COMBINATIONS:
        logical, structural = (mean_known([content["detection"]["+".join(branches)][kind]["auroc"]
                                      for content in measured.values()]) for kind in ANOMALIES)
        lines.append(f"average {branches} logical {logical:.3f} structural {structural:.3f} "
                     f"mean {mean_known([logical, structural]):.3f}")
    if stand_ins := used_by_any([measured]):
        lines.append(f"made with stand-ins: {', '.join(stand_ins)}; not comparable with published figures")
    lines.append(PUBLISHED)

    both = "+".join(COMBINATIONS[-1])
    columns = ("average precision", "F1-max")
    lines += ["", "image level, both branches, in percent", f"{'':34}" + "".join(f"{column:>19}" for column in columns)]
    for name, content in measured.items():
        lines += [f"{name:22}{kind:12}{found['average_precision']:19.3f}{found['f1_max']:19.3f}"
                  for kind, found in content["detection"][both].items()]

    columns = ("pixel AUROC", "pixel F1-max", *(f"sPRO {limit}" for limit in localisation.FPR_LIMITS))
    lines += ["", "localisation by LGST's anomaly maps, in percent (sPRO: area under the saturated per-region overlap up to "
              "this false-positive rate)", f"{'':34}" + "".join(f"{column:>14}" for column in columns)]
    rows: dict[str, list[list[float]]] = {kind: [] for kind in ANOMALIES}
    for name, content in measured.items():
        if "missing" in content["localisation"]:
            lines.append(f"{name:22}not measured: {content['localisation']['missing']}")
            continue
        for kind, found in content["localisation"].items():
            rows[kind].append([found["pixel_auroc"], found["pixel_f1_max"], *found["spro"].values()])
            lines.append(f"{name:22}{kind:12}" + "".join(f"{value:14.3f}" for value in rows[kind][-1]))
    means = {kind: np.mean(values, axis=0) for kind, values in rows.items() if values}
    if means:
        means["mean"] = np.mean(list(means.values()), axis=0)
        lines += [f"{'average':22}{kind:12}" + "".join(f"{value:14.3f}" for value in mean) for kind, mean in means.items()]
    return lines


def used_stand_ins(category: str, workspace: Workspace) -> set[str]:
    """Stand-ins noted in the records beside the checkpoints; files made elsewhere have none."""
    recorded = [path.with_suffix(".json") for path in (workspace.segmentor(category), workspace.lgst(category))]
    return {name for path in recorded if path.exists() for name in files.read_json(path)["stand_ins"]}


if __name__ == "__main__":
    run_script(main)
