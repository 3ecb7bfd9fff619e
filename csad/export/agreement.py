"""Whether an exported file gives the scores and maps of the PyTorch model that it was made from, image by image and branch by
branch.

Every new export is asked, on validation images, in a process of its own (`csad.export.fresh_process`), before it takes the old
one's place. A difference is measured in units of the PyTorch scores' spread over these images, as what matters is whether one
could take a good image for another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csad.data import layouts
from csad.errors import UserError
from csad.export import exported_thresholds, fresh_process
from csad.export.fresh_process import Scored
from csad.inference.engines import read_for
from csad.inference.runtimes import TorchEngine

import numpy as np

from models.fusion import before_softplus, fused_map
from models.prediction import Prediction

COMPARED = 16  # validation images at most, evenly spread over the sorted list
# Scores are normalised, so those of good images spread over about 1. Of two or three images they may lie close together,
# and then the rounding of what is normalised is large beside their spread.
MIN_SPREAD = 0.5
ROUNDING = 0.05  # of the scores' own size: the same for scores so large that fp32 has few digits left for their spread
TOLERATED = 1e-3  # in fp32, of the spread
# In other precisions and on accelerators, whose fp32 may be TF32: on average; as int8's guard says.
TOLERATED_ROUGHLY = 0.2
TOLERATED_PIXELS = (
    1e-3  # of a label map in fp32, which may differ where two classes are equal but for rounding
)
# The same in fp32 of a branch's score, in standard deviations of good images over its sharpness, where it adds
# next to nothing: no more than a 60th of one. OpenVINO's Softplus alone makes 0.02.
TOLERATED_UNSEEN = 0.1
# Of an anomaly map's mean, by which one differs on average: of any image in fp32, of all in other precisions.
TOLERATED_MAP, TOLERATED_MAP_ROUGHLY = 0.05, 0.5
FAINT = 0.05  # a mean that is no larger is taken as this, so that nothing is asked of maps of next to nothing
TIES = 0.25  # of the images may differ by more, up to `TOLERATED_ROUGHLY`, where the model does not give its label maps


def accept(path: Path, reference: TorchEngine, category: layouts.Category, device: str) -> None:
    """Compare a written export with PyTorch on validation images, and note in it the threshold that follows
    from its own scores; UserError if it gives other scores than PyTorch, or some that are not finite."""
    paths = category.validation
    compared = spread_evenly(len(paths))
    scored = fresh_process.score(path, paths, compared, device, f"{category.name}: score validation images")
    metadata = {"networks": scored.networks} | scored.metadata
    # First, as it is the stages that are to be trained again where PyTorch's scores are not finite, either.
    names = [path.relative_to(category.root).as_posix() for path in paths]
    metadata = exported_thresholds.with_validation_scores(metadata, scored.scores, category.name, names)
    exactly = metadata.get("precision", "fp32") == "fp32" and scored.device.startswith("cpu")
    if problem := disagreement(reference, [paths[index] for index in compared], scored, exactly):
        raise UserError(
            f"{category.name}: the new {path.name} does not give PyTorch's scores and maps of {len(compared)} validation "
            f"images, so it is not kept and an earlier one stays as it is: {problem}"
        )
    exported_thresholds.write_metadata(path, metadata)


def spread_evenly(count: int) -> list[int]:
    """Indices of the validation images that are compared, of so many, rising."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, COMPARED))})


def spread(scores: np.ndarray) -> float:
    """Robust standard deviation of scores (n,), from their quartiles, with a floor."""
    low, median, high = np.quantile(scores, (0.25, 0.5, 0.75))
    return max(float(high - low) / 1.349, MIN_SPREAD, ROUNDING * abs(float(median)))


def disagreement(
    reference: TorchEngine, pictures: Sequence[Path], scored: Scored, exactly: bool
) -> str | None:
    """How an exported model's scores and maps of pictures differ from PyTorch's by more than is tolerated; None: they do not.

    Args:
        reference: the model in fp32 on the CPU.
        pictures: the images that were scored, (N,).
        scored: what the exported model gave.
        exactly: it ran in fp32 on the CPU.
    """
    given = (scored.score, scored.branch_scores, scored.anomaly_map)
    if not all(np.isfinite(values).all() for values in given if values is not None):
        return "it gives numbers that are not finite"
    predictions = zip(*(reference.predict(read_for(reference, [path])) for path in pictures))
    expected = Prediction(*map(np.concatenate, predictions))
    contributions, branch_maps = expected.branch_scores, expected.branch_maps
    # Asked for, as no comparison with NaN is ever true: any other number would agree with it.
    if not all(np.isfinite(values).all() for values in (contributions, expected.anomaly_map, branch_maps)):
        return "PyTorch itself gives numbers that are not finite"
    if exactly and "patchhist" in reference.branches and scored.label_map is not None:
        moved = (scored.label_map != expected.label_map).mean((1, 2)).max()
        if moved > TOLERATED_PIXELS:
            return f"up to {100 * moved:.3g} % of a label map differ"
        # Each of the few pixels that are ties may move score and map: the histogram is asked about the model's own label map.
        column = reference.branches.index("patchhist")
        contributions[:, column], branch_maps[:, column] = reference.arrangement(scored.label_map)
    compared = {"score": (contributions.sum(1), scored.score)}
    if scored.branch_scores is not None:
        of_branches = zip(reference.branches, contributions.T, scored.branch_scores.T)
        compared |= {f"{branch} score": (exact, actual) for branch, exact, actual in of_branches}
    for name, (exact, actual) in compared.items():
        apart = np.abs(exact - actual) / spread(exact)
        if exactly and scored.branch_scores is None and "patchhist" in reference.branches:
            most = np.quantile(apart, 1 - TIES, method="lower")
            beyond = most > TOLERATED or apart.max() > TOLERATED_ROUGHLY
        else:
            beyond = apart.max() > TOLERATED if exactly else apart.mean() > TOLERATED_ROUGHLY
        if beyond:
            tolerated = f"at most {TOLERATED:g}" if exactly else f"{TOLERATED_ROUGHLY:g} on average"
            return (
                f"the {name} is off by up to {apart.max():.2g} of its spread over "
                f"them ({apart.mean():.2g} on average; tolerated: {tolerated})"
            )
    if scored.branch_scores is None or scored.anomaly_map is None:
        return None
    rule = reference.metadata.get("fusion_rule", "sum")
    maps = fused_map(branch_maps, contributions, rule)
    unseen = None
    if exactly and rule == "softplus":
        unseen = _disagreement_before_softplus(reference, contributions, scored.branch_scores)
    return unseen or _disagreement_of_maps(maps, scored.anomaly_map, exactly)


def _disagreement_before_softplus(
    reference: TorchEngine, contributions: np.ndarray, given: np.ndarray
) -> str | None:
    """Good images add next to nothing, whatever a branch says of them; of anomalous ones it would show."""
    weights = np.array([reference.metadata["branch_weights"][branch] for branch in reference.branches])
    apart = np.abs(before_softplus(contributions / weights) - before_softplus(given / weights)).max(0)
    for branch, most in zip(reference.branches, apart):
        if most > TOLERATED_UNSEEN:
            return (
                f"the {branch} score is off by up to {most:.2g} before softplus (tolerated: {TOLERATED_UNSEEN:g}), "
                "which good images hardly show"
            )
    return None


def _disagreement_of_maps(maps: np.ndarray, given: np.ndarray, exactly: bool) -> str | None:
    apart = np.abs(maps - given).mean((1, 2)) / np.maximum(maps.mean((1, 2)), FAINT)
    if apart.max() > TOLERATED_MAP if exactly else apart.mean() > TOLERATED_MAP_ROUGHLY:
        return (
            f"the anomaly map is off by up to {apart.max():.2g} of its mean ({apart.mean():.2g} on average)"
        )
    return None
