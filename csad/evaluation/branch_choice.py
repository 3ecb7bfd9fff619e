"""Which branches are fused in a category: those of the settings, and each optional one that finds synthetic defects better.

Decided by stage 4 on validation images: as they are, with defects drawn into them (csad.training.structural_synthesis), and with
parts too many (csad.training.logical_synthesis). So no anomalous picture is needed, and no test image decides; stage 5 fuses
the same branches. Beyond the paper (docs/METHOD.md section 6).
"""

from __future__ import annotations

from collections.abc import Sequence

from csad.data import files, records
from csad.data.workspace import STAGES, Workspace
from csad.evaluation.metrics import auroc
from csad.settings import FusionSettings

import numpy as np

PLANTED = 48  # pictures of each kind of anomaly, spread over as many validation images
LEAST_GAIN = 1.0  # points of image AUROC on planted defects, mean of both kinds; less may be chance


def on_offer(category: str, workspace: Workspace, chosen: FusionSettings) -> list[str]:
    """The offered branches whose stage was run."""
    return [branch for branch in chosen.offered if branch not in chosen.branches
            and workspace.checkpoint(category, branch).exists() and workspace.scores(category, branch, "val").exists()]


def aurocs(good: np.ndarray, structural: np.ndarray, logical: np.ndarray, branches: Sequence[str], chosen: FusionSettings
           ) -> dict[str, float]:
    """Image AUROC in percent on planted defects, by branches: of the settings' sum, and of this with each other branch.

    Args:
        good, structural, logical: (n, K), what each of the K branches adds to the score of each image.
        branches: their names.

    Returns:
        The means of structural and logical anomalies, of those there are; NaN, with which none is fused, where a score is not
        finite.
    """
    def of(some: list[str]) -> float:
        columns = [branches.index(branch) for branch in some]
        sums = [part[:, columns].sum(1) for part in (good, structural, logical)]
        return float(np.mean([auroc(sums[0], kind) for kind in sums[1:] if len(kind)] or [np.nan]))

    sums = [chosen.branches, *([*chosen.branches, branch] for branch in branches if branch not in chosen.branches)]
    return {_name(some): of(some) for some in sums}


def helpful(found: dict[str, float], chosen: FusionSettings) -> list[str]:
    """The branches to fuse, from `aurocs`."""
    enough = found[_name(chosen.branches)] + LEAST_GAIN
    helping = [branch for branch in chosen.offered if found.get(_name([*chosen.branches, branch]), -np.inf) >= enough]
    return in_order([*chosen.branches, *helping])


def in_order(branches: Sequence[str]) -> list[str]:
    """As all tables list them."""
    return [branch for branch in STAGES if branch in branches]


def _name(branches: Sequence[str]) -> str:
    return "+".join(in_order(branches))


def write(category: str, workspace: Workspace, chosen: FusionSettings, found: dict[str, float], branches: list[str]) -> None:
    files.write_json(workspace.branch_choice(category), {
        "branches": branches, "auroc_on_planted_defects": found, "settings": chosen.model_dump(),
        "scores": _digests(category, workspace, chosen)})


def fused_branches(category: str, workspace: Workspace, chosen: FusionSettings) -> tuple[list[str], str]:
    """What stage 4 decided by the present settings and validation scores, or else the settings' branches.

    Returns:
        The branches, and a sentence if optional ones are there on which stage 4 has not decided as things are now.
    """
    path, available = workspace.branch_choice(category), on_offer(category, workspace, chosen)
    if not available:
        return in_order(chosen.branches), ""
    undecided = "has not decided yet"
    if path.exists():
        decision = files.read_json(path, keys={"branches": list, "settings": dict, "scores": object})
        if decision["settings"] == chosen.model_dump() and decision["scores"] == _digests(category, workspace, chosen):
            return in_order(decision["branches"]), ""
        undecided = ("decided with other fusion settings" if decision["settings"] != chosen.model_dump()
                     else "decided by other validation scores") + " than there are now"
    return in_order(chosen.branches), (f"export_model.py {undecided} whether {', '.join(available)} is fused, so it is left out "
                                       "here; run export_model.py again")


def _digests(category: str, workspace: Workspace, chosen: FusionSettings) -> dict[str, str]:
    paths = [workspace.scores(category, branch, "val") for branch in (*chosen.branches, *chosen.offered)]
    return {path.name: records.digest(path) for path in paths if path.exists()}
