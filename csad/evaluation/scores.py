"""The validation and test scores that stages 2, 3 and 3b left, brought to one scale, and whose images they are of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from csad.branches import BRANCHES
from csad.data import files, layouts, records
from csad.data.workspace import HELD_OUT, SCORE_PARTS, Workspace
from csad.errors import UserError
from csad.evaluation.metrics import mean_known

import numpy as np

from models.fusion import apply_z, fit_normalisation, fuse

# Each after the good images, in sorted file order.
SPLIT_OF_PART = {"logi": layouts.LOGICAL, "struc": layouts.STRUCTURAL}
Scores = dict[str, dict[str, np.ndarray]]
FUSED = "fused"  # the key of the weighted sum among single branches and other sums
MANY = 15  # categories; of more, a terminal and the report show the lowest in full, and of the others what fits into one line


def scored_branches(category: layouts.Category, workspace: Workspace, fused: list[str]) -> list[str]:
    """The branches whose stage was run: the fused ones, which have to be there (UserError, names the stage),
    and any other that is."""
    for branch in fused:
        for part in SCORE_PARTS:
            files.require(workspace.scores(category.name, branch, part), BRANCHES[branch].stage)
    return [
        branch
        for branch in BRANCHES
        if branch in fused
        or all(workspace.scores(category.name, branch, part).exists() for part in SCORE_PARTS)
    ]


def read_scores(category: layouts.Category, workspace: Workspace, branch: str, part: str) -> np.ndarray:
    """(n,) float of one of `SCORE_PARTS`; UserError if the file is missing, holds numbers that are not
    finite, or another number of them than there are images."""
    path = files.require(workspace.scores(category.name, branch, part), BRANCHES[branch].stage)
    scores = files.read_array(path)
    images = category.validation
    if part != "val":
        images = category.test(layouts.GOOD) + category.test(SPLIT_OF_PART[part])
    if scores.shape != (len(images),) or scores.dtype.kind != "f":
        raise UserError(
            f"{path} holds {scores.size} scores but the data set has {len(images)} such images; "
            f"run {BRANCHES[branch].stage} again"
        )
    return scores


def normalisation(
    category: layouts.Category, workspace: Workspace, branch: str, rule: str, std_floor: float = 0.0
) -> tuple[float, float]:
    """By what a branch's scores are normalised (`models.fusion.fit_normalisation`): its scores of good
    images. Errors as of `read_scores`."""
    good = [read_scores(category, workspace, branch, "val")]
    if (held_out := workspace.scores(category.name, branch, HELD_OUT)).exists():
        good.append(files.read_array(held_out))
    return fit_normalisation(np.concatenate(good), branch, rule, std_floor)


def normalised_scores(
    category: layouts.Category, workspace: Workspace, branches: list[str], rule: str
) -> Scores:
    """Per branch its scores of the parts logi, struc and val, normalised on val by the fusion's rule (docs/method.md section 4).

    Raises:
        UserError: a file is missing, holds another number of scores than there are images, or scores that are not finite, or is
            of other images than there are now.
    """
    digests = records.scored_images(category.validation, layouts.test_splits(category))
    normalised = {}
    for branch in branches:
        record, maps = workspace.record(category.name, branch), workspace.anomaly_maps(category.name, branch)
        scores = {part: read_scores(category, workspace, branch, part) for part in SCORE_PARTS}
        used = [workspace.scores(category.name, branch, part) for part in SCORE_PARTS if part != "val"]
        used += workspace.good_scores(category.name, branch) + [maps] * maps.exists()
        records.require_current(record, digests, used, BRANCHES[branch].stage)
        mean, std = normalisation(category, workspace, branch, rule)
        normalised[branch] = {part: apply_z(values, mean, std) for part, values in scores.items()}
    return normalised


def fused_parts(scores: Scores, weights: dict[str, float], rule: str) -> dict[str, np.ndarray]:
    """The weighted sum of the branches in ``weights``, of each of `SCORE_PARTS`."""
    return {
        part: fuse({branch: scores[branch][part] for branch in weights}, weights, rule)
        for part in SCORE_PARTS
    }


def by_split(category: layouts.Category, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One branch's scores by split of test images, each in sorted file order."""
    good = len(category.test(layouts.GOOD))
    return {
        layouts.GOOD: parts["logi"][:good],
        **{split: parts[part][good:] for part, split in SPLIT_OF_PART.items()},
    }


def fused_mean(metrics: dict[str, Any]) -> float:
    """A category's image AUROC by the fused branches, mean of logical and structural; NaN where neither was measured."""
    return mean_known(aurocs["auroc"] for aurocs in metrics["detection"][FUSED].values())


def lowest_first(measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The categories' metrics by `fused_mean`, rising; those that are not known come last."""
    return sorted(measured, key=lambda metrics: (np.isnan(mean := fused_mean(metrics)), mean))


def recorded(category: str, workspace: Workspace, branch: str) -> dict[str, Any]:
    """What the record beside a branch's checkpoint says was used; nothing of files made elsewhere, which have none."""
    path = workspace.record(category, branch)
    return records.read_record(path)["used"] if path.exists() else {}


def reservations(measured: Iterable[dict[str, Any]]) -> list[str]:
    """The lines that tables carry where something stands in for the published networks, or weights were chosen on test images."""
    contents, lines = list(measured), []
    if stand_ins := sorted({name for content in contents for name in content["stand_ins"]}):
        lines.append(f"made with stand-ins: {', '.join(stand_ins)}; not comparable with published figures")
    if chosen := dict.fromkeys(name for content in contents for name in content.get("chosen_on_test", ())):
        names = ", ".join(chosen)
        lines.append(
            f"weights of {names}: chosen on test images, as published; not an estimate of performance"
        )
    return lines


def digest_scores(category: layouts.Category, workspace: Workspace, branches: list[str]) -> dict[str, str]:
    """Of the files that metrics are computed from, by name: report.py shows no metrics of other scores."""
    paths = [workspace.scores(category.name, branch, part) for branch in branches for part in SCORE_PARTS]
    paths += [workspace.scores(category.name, branch, HELD_OUT) for branch in branches]
    paths += [workspace.anomaly_maps(category.name, branch) for branch in branches]
    return {path.name: records.digest(path) for path in paths if path.exists()}
