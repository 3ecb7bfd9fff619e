"""The test and validation scores that stages 2 and 3 left, brought to one scale."""

from __future__ import annotations

import numpy as np

from data import files, layouts, records
from data.workspace import Workspace
from errors import UserError
from models.fusion import apply_trimmed_z, fit_trimmed_z

BRANCHES = {"patchhist": "train_segmentor.py", "LGST": "CSAD.py"}
PARTS = {"logi": layouts.LOGICAL, "struc": layouts.STRUCTURAL}  # each after the good images, in sorted file order


def normalised_scores(category: layouts.Category, workspace: Workspace) -> dict[str, dict[str, np.ndarray]]:
    """Per branch its scores of the parts logi, struc and val, trimmed-z-normalised on val (METHOD.md section 4).

    Raises:
        UserError: a file is missing, or holds another number of scores than there are images.
    """
    normalised = {}
    for branch, stage in BRANCHES.items():
        scores = {part: files.read_array(files.require(workspace.scores(category.name, branch, part), stage))
                  for part in (*PARTS, "val")}
        for part, kind in PARTS.items():
            expected = len(category.test(layouts.GOOD)) + len(category.test(kind))
            if scores[part].shape != (expected,):
                raise UserError(f"{workspace.scores(category.name, branch, part)} holds {scores[part].size} scores but "
                                f"the data set has {expected} such images; run {stage} --overwrite")
        mean, std = fit_trimmed_z(scores["val"])
        normalised[branch] = {part: apply_trimmed_z(values, mean, std) for part, values in scores.items()}
    return normalised


def digest_scores(category: layouts.Category, workspace: Workspace) -> dict[str, str]:
    """Of the files that metrics are computed from, by name: report.py shows no metrics of other scores."""
    paths = [workspace.scores(category.name, branch, part) for branch in BRANCHES for part in (*PARTS, "val")]
    return {path.name: records.digest(path) for path in (*paths, workspace.anomaly_maps(category.name)) if path.exists()}
