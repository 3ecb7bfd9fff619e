"""Everything there is to measure about a category: detection by each sum of branches, single defects, localisation."""

from __future__ import annotations

import sys
from typing import Any

from csad import settings
from csad.branches import BRANCHES, PAPER_BRANCHES
from csad.data import layouts
from csad.data.defects import DefectNames
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation import branch_weights, localisation
from csad.evaluation.metrics import auroc, average_precision, f1_max
from csad.evaluation.scores import (
    FUSED,
    Scores,
    by_split,
    digest_scores,
    fused_parts,
    normalised_scores,
    recorded,
    scored_branches,
)
from csad.progress import ProgressBar

import numpy as np

from models.constants import SIZE
from models.fusion import contribution

NO_COMPONENT_MAP = (
    "the patch histogram has no map, as the exported model has none without --segmentor.evidence"
)
ANOMALIES = {split.removesuffix("_anomalies"): split for split in (layouts.LOGICAL, layouts.STRUCTURAL)}


def measure(category: layouts.Category, workspace: Workspace, cfg: settings.Settings) -> dict[str, Any]:
    """Everything there is to measure about one category."""
    weights, undecided = branch_weights.read(category.name, workspace, cfg.fusion)
    rule = cfg.fusion.rule
    if undecided:
        ProgressBar.write(f"{category.name}: {undecided}", file=sys.stderr)
    fused = list(weights)
    roi = read_roi(category, SIZE, cfg.roi)
    branches = scored_branches(category, workspace, fused)
    scores = normalised_scores(category, workspace, branches, rule)
    used = [recorded(category.name, workspace, branch) for branch in branches]
    sums = {
        name: by_split(category, fused_parts(scores, of_branches, rule))
        for name, of_branches in (equal_sums(branches) | {FUSED: weights}).items()
    }
    return {
        "category": category.name,
        "dataset": category.root.resolve().parent.name,
        "fused": fused,
        "rule": rule,
        "undecided": undecided,
        "weights": weights,
        "stand_ins": sorted({name for record in used for name in record.get("stand_ins", ())}),
        # By csad.training.best_on_test.
        "chosen_on_test": [branch for branch, record in zip(branches, used) if "selection" in record],
        "measured": digest_scores(category, workspace, branches),
        "detection": {name: detection(split_scores) for name, split_scores in sums.items()},
        "defects": single_defects(category, sums),
        "localisation": {
            name: localisation_metrics(category, workspace, scores, rule, sum_weights, roi)
            for name, sum_weights in [*((branch, {branch: 1.0}) for branch in branches), (FUSED, weights)]
        },
    }


def equal_sums(branches: list[str]) -> dict[str, dict[str, float]]:
    """Which plain sums are measured besides the weighted one: the published three first, further branches, all of them."""
    paper: list[str] = [branch for branch in branches if branch in PAPER_BRANCHES]
    sums = [*([branch] for branch in paper), paper, *([branch] for branch in branches), branches]
    return {"+".join(names): dict.fromkeys(names, 1.0) for names in sums if names}


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


def single_defects(
    category: layouts.Category, sums: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Image AUROC of each defect whose images are known by name, against all good images."""
    defects: dict[str, dict[str, Any]] = {}
    defect_names = DefectNames(category)
    named = {
        kind: [defect_names.of(split, path) for path in category.test(split)]
        for kind, split in ANOMALIES.items()
    }
    of_both_kinds = set(named["logical"]) & set(named["structural"])
    for kind, names in named.items():
        for name in sorted({name for name in names if name}):
            selected = np.array([defect == name for defect in names])
            defects[f"{kind} {name}" if name in of_both_kinds else name] = {
                "kind": kind,
                "images": int(selected.sum()),
                "auroc": {
                    name: auroc(split_scores[layouts.GOOD], split_scores[ANOMALIES[kind]][selected])
                    for name, split_scores in sums.items()
                },
            }
    return defects


def localisation_metrics(
    category: layouts.Category,
    workspace: Workspace,
    scores: Scores,
    rule: str,
    weights: dict[str, float],
    roi: np.ndarray | None,
) -> dict[str, dict]:
    """Localisation by the branches' maps, logical and structural apart; {"missing": why} where it cannot be measured."""
    # Of the exported model's branches the patch histogram says where with `segmentor.evidence` alone.
    used = recorded(category.name, workspace, "patchhist") if "patchhist" in weights else {}
    evidence = used.get("segmentor", {}).get("evidence", True)
    drawing = [branch for branch in weights if branch != "patchhist" or evidence]
    if not drawing:
        return {name: {"missing": NO_COMPONENT_MAP} for name in ANOMALIES}
    maps, contributions = {}, {}
    for branch in drawing:
        path = workspace.anomaly_maps(category.name, branch)
        if not path.exists():
            why = f"{path.relative_to(workspace.root)} is missing; {BRANCHES[branch].stage} adds it without training again"
            return {name: {"missing": why} for name in ANOMALIES}
        maps[branch] = localisation.read_maps(path)
        contributions[branch] = {
            split: weights[branch] * contribution(values, rule)
            for split, values in by_split(category, scores[branch]).items()
        }
    metrics = {}
    for name, split in ANOMALIES.items():
        try:
            if not category.test(split):
                raise UserError(f"{category.name} has no {name} test images")
            fused = localisation.fused_maps(category, maps, contributions, rule, (layouts.GOOD, split))
            measured = localisation.measure(category, fused, split, roi)
            metrics[name] = {
                "spro": {str(limit): area for limit, area in measured.spro.items()},
                "pixel_auroc": measured.pixel_auroc,
                "pixel_f1_max": measured.pixel_f1_max,
                "left_out": sorted(localisation.without_masks(category, split)),
                "note": NO_COMPONENT_MAP if len(drawing) < len(weights) else "",
            }
        except UserError as problem:  # image-level figures are worth having without it
            # Metrics and report go to other people, whose folders are others.
            sentence = str(problem).replace(f"{category.root.parent}/", "")
            metrics[name] = {"missing": sentence.replace(f"{workspace.root}/", "")}
    return metrics
