"""The weight of each branch in a category, 0 among the values: decided by stage 4, without anomalous pictures.

The weighted sum has to tell validation images from the same images with synthetic defects
(csad.training.synthetic_defects). Stage 5 takes the weights that stage 4 decided on. Beyond the paper
(docs/beyond.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from csad.branches import BRANCHES
from csad.data import files, records
from csad.data.workspace import Workspace
from csad.settings import FusionSettings

import numpy as np

from models.fusion import apply_z, fit_z

WEIGHTS = (0.0, 0.25, 0.5, 1.0)
DIFFICULTY = 90.0  # image AUROC that the best branch should have on the synthetic defects that count
STANDARD_ERRORS, RESAMPLINGS = 2.0, 200  # of the gain by which other weights than the settings' replace these
MIN_GAIN = 0.25  # points of image AUROC, mean of both kinds, that a further branch has to add
MAX_COST = 2.5  # of the same points, which the patch histogram may take away
HISTOGRAM_WEIGHTS = (0.5, 0.25, 0.125, 0.0)  # with its sharpness 1/2 is what 1 is to the others
HISTOGRAM, FUSED, EQUAL = "patchhist", "fused", "equal weights"


class Defects(NamedTuple):
    """Synthetic defects of one kind, structural or logical."""

    # (n, K), what each of the K branches adds to the score of each image at weight 1.
    contributions: np.ndarray
    strengths: np.ndarray  # (n,) in 0..1


class Decision(NamedTuple):
    """The weights, and what speaks for them."""

    weights: dict[str, float]  # of the branches that count, by name
    # Image AUROC in percent on the synthetic defects that count, by kind, then by branch, and of the sums
    # `EQUAL` and `FUSED`.
    aurocs: dict[str, dict[str, float]]
    strengths: dict[str, tuple[float, float]]  # the smallest and the largest strength of these, by kind

    @property
    def description(self) -> str:
        """In a line, for people."""
        aurocs = "; ".join(
            f"{kind} " + ", ".join(f"{name} {value:.1f}" for name, value in by_sum.items())
            for kind, by_sum in self.aurocs.items()
        )
        return f"fuses {describe(self.weights)}; image AUROC on synthetic defects: {aurocs}"


def describe(weights: Mapping[str, float]) -> str:
    """For example: patchhist 0.5, memory 1."""
    return ", ".join(f"{branch} {weight:g}" for branch, weight in weights.items())


def candidates(category: str, workspace: Workspace, fusion: FusionSettings) -> list[str]:
    """The settings' branches, and the optional ones whose stage was run, as all tables list them."""
    optional = [
        branch
        for branch in fusion.optional
        if workspace.checkpoint(category, branch).exists()
        and workspace.scores(category, branch, "val").exists()
    ]
    return [branch for branch in BRANCHES if branch in (*fusion.branches, *optional)]


def choose(
    good: np.ndarray,
    defects: Mapping[str, Defects],
    branches: Sequence[str],
    default: Collection[str],
) -> Decision:
    """Weigh branches by what their sums find of synthetic defects.

    The settings' own branches count 1 and the optional ones 0, unless other weights find more, image AUROC, mean of the
    kinds of defects, by `STANDARD_ERRORS` of the difference: what a few synthetic defects say of a category is
    uncertain. The patch histogram sees the arrangement alone, and every synthetic defect in the arrangement leaves
    traces that the other branches see. Thus it need not add anything: it gets the largest weight that costs at most
    `MAX_COST`.

    Args:
        good: (n, K), what each branch adds to the score of each good image at weight 1.
        defects: structural and logical ones.
        branches: the K branches' names.
        default: the settings' own branches.
    """
    counted = {kind: _of_difficulty(good, of_kind) for kind, of_kind in defects.items()}

    def aurocs(weights: Sequence[float]) -> dict[str, float]:
        return {
            kind: 100 * float(_wins(good @ weights, of_kind.contributions @ weights).mean())
            for kind, of_kind in counted.items()
        }

    def value(weights: Sequence[float]) -> float:
        return float(np.mean(list(aurocs(weights).values())))

    # Largest weights first: of equally good ones these are kept.
    values = [WEIGHTS[::-1] if branch != HISTOGRAM else (0.0,) for branch in branches]
    surface = [weights for weights in itertools.product(*values) if max(weights) == 1]
    own = tuple(float(branch in default and branch != HISTOGRAM) for branch in branches)
    best = max(
        surface, key=lambda weights: value(weights) - MIN_GAIN * np.count_nonzero(weights), default=own
    )
    if any(own):
        uncertainty = STANDARD_ERRORS * _standard_error(good, counted, best, own)
        best = own if value(best) - value(own) <= uncertainty else best
    if HISTOGRAM in branches:
        position = list(branches).index(HISTOGRAM)
        options = [(*best[:position], weight, *best[position + 1 :]) for weight in HISTOGRAM_WEIGHTS]
        best = next(
            weights for weights in options if not any(best) or value(weights) >= value(best) - MAX_COST
        )
    named = {branch: np.eye(len(branches))[index] for index, branch in enumerate(branches)}
    named |= {EQUAL: np.ones(len(branches)), FUSED: np.array(best)}
    measured = {name: aurocs(weights) for name, weights in named.items()}
    strengths = {kind: of_kind.strengths for kind, of_kind in counted.items()}
    return Decision(
        {branch: weight for branch, weight in zip(branches, best) if weight},
        {kind: {name: of_sum[kind] for name, of_sum in measured.items()} for kind in counted},
        {kind: (float(values.min()), float(values.max())) for kind, values in strengths.items()},
    )


def parts_noticed(parameters: Mapping[str, np.ndarray]) -> float | None:
    """AUROC in percent by which the patch histogram tells held-out training images from the same without a part.

    The part is missing in their label maps, thus nothing but what segmentation makes of good images keeps the
    histogram from noticing. None where stage 2 did not measure it (``segmentor.reliability``).

    Args:
        parameters: `models.patch_histogram.fit_parameters`.
    """
    complete = incomplete = np.zeros(1)
    for name in ("hist", "patch_hist"):
        if not len(parameters.get(f"{name}_incomplete_score", ())):
            return None
        mean, std = fit_z(parameters[f"{name}_held_out_score"])
        complete = complete + apply_z(parameters[f"{name}_held_out_score"], mean, std)
        incomplete = incomplete + apply_z(parameters[f"{name}_incomplete_score"], mean, std)
    return 100 * float(_wins(complete, incomplete).mean())


def _standard_error(
    good: np.ndarray, defects: Mapping[str, Defects], weights: Sequence[float], others: Sequence[float]
) -> float:
    """Of the difference between what two sums find, image AUROC, by resampling of good images and defects."""
    rng, differences = np.random.default_rng(0), []
    wins = [
        _wins(good @ weights, of_kind.contributions @ weights)
        - _wins(good @ others, of_kind.contributions @ others)
        for of_kind in defects.values()
    ]
    for _ in range(RESAMPLINGS):
        images = rng.integers(len(good), size=len(good))
        resampled = [of_kind[rng.integers(len(of_kind), size=len(of_kind))][:, images] for of_kind in wins]
        differences.append(100 * np.mean([of_kind.mean() for of_kind in resampled]))
    return float(np.std(differences))


def _wins(good: np.ndarray, anomalous: np.ndarray) -> np.ndarray:
    """(m, n): 1 where an anomalous image scores higher than a good one, 1/2 where both score the same.

    The mean is the AUROC.
    """
    return (anomalous[:, None] > good) + 0.5 * (anomalous[:, None] == good)


def _of_difficulty(good: np.ndarray, defects: Defects) -> Defects:
    """Half of the defects, neighbours by strength, on which the best branch is nearest to `DIFFICULTY`."""
    ranks = np.argsort(defects.strengths, kind="stable")
    count = -(-len(ranks) // 2)
    windows = [ranks[first : first + count] for first in range(0, len(ranks) - count + 1, max(count // 6, 1))]

    def distance(window: np.ndarray) -> float:
        best = max(100 * _wins(*columns).mean() for columns in zip(good.T, defects.contributions[window].T))
        return abs(best - DIFFICULTY)

    window = min(windows, key=distance)
    return Defects(defects.contributions[window], defects.strengths[window])


def write(category: str, workspace: Workspace, fusion: FusionSettings, decision: Decision) -> None:
    files.write_json(
        workspace.branch_weights(category),
        {
            "weights": decision.weights,
            "auroc_on_synthetic_defects": decision.aurocs,
            "strengths": decision.strengths,
            "settings": fusion.model_dump(),
            "scores": _digests(category, workspace, fusion),
        },
    )


def equal(branches: Sequence[str]) -> dict[str, float]:
    """1 for each."""
    return {branch: 1.0 for branch in BRANCHES if branch in branches}


def read(category: str, workspace: Workspace, fusion: FusionSettings) -> tuple[dict[str, float], str]:
    """The weights that stage 4 decided on by the present settings and validation scores, and an empty sentence.

    Where it has not decided, or by something else, `equal` weights, and a sentence that says so.
    """
    if fusion.weights == "equal" or len(candidates(category, workspace, fusion)) < 2:
        return equal(fusion.branches), ""
    path, reason = workspace.branch_weights(category), "has not weighed the branches yet"
    if path.exists():
        decided = files.read_json(path, keys={"weights": dict, "settings": dict, "scores": dict})
        if decided["settings"] != fusion.model_dump():
            reason = "weighed the branches with other fusion settings than there are now"
        elif decided["scores"] != _digests(category, workspace, fusion):
            reason = "weighed the branches by other validation scores than there are now"
        else:
            weights = decided["weights"]
            return {branch: weights[branch] for branch in BRANCHES if branch in weights}, ""
    sentence = f"export_model.py {reason}, so each counts the same here; run export_model.py again"
    return equal(fusion.branches), sentence


def _digests(category: str, workspace: Workspace, fusion: FusionSettings) -> dict[str, str]:
    branches = (*fusion.branches, *fusion.optional)
    paths = [path for branch in branches for path in workspace.good_scores(category, branch)]
    return {path.name: records.digest(path) for path in paths if path.exists()}
