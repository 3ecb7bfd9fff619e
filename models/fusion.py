"""How branches are made comparable and added (docs/method.md sections 2 and 4, docs/beyond.md). NumPy only."""

from __future__ import annotations

from collections.abc import Mapping

from csad.branches import BRANCHES

import numpy as np

TRIMMED = (0.2, 0.8)  # quantiles between which a validation score counts
UPPER, UPPER_Z = 0.9, 1.2816  # a quantile, and where the normal distribution has it
EXPORTED_STD_FLOOR = 1e-3  # in the exported model, a std up to this one counts as none
# The fused map: powers of what a branch adds to the score, and of its map's maximum, by which the map is divided.
STRENGTH_EXPONENT, MAXIMUM_EXPONENT = 0.1, 0.75


def fit_trimmed_z(validation: np.ndarray, std_floor: float = 0.0) -> tuple[float, float]:
    """Mean and std (divisor n) of the scores strictly between their 20 % and 80 % quantiles.

    Args:
        validation: scores of good images, (n,), n >= 1.
        std_floor: the std is taken as 1 where it is no larger than this; 0 for score files, `EXPORTED_STD_FLOOR`
            for the exported model.

    Returns:
        The two numbers for `apply_z`. Where nothing lies strictly between the quantiles (all scores
        equal, or fewer than three), all scores count.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    validation = np.asarray(validation, dtype=np.float64)
    middle = validation
    if validation.size and np.isfinite(validation).all():
        low, high = np.quantile(validation, TRIMMED)
        middle = validation[(validation > low) & (validation < high)]
    return fit_z(middle if middle.size else validation, std_floor)


def fit_z(validation: np.ndarray, std_floor: float = 0.0) -> tuple[float, float]:
    """Mean and std (divisor n) of all scores; arguments and errors as of `fit_trimmed_z`.

    Of few validation images, whose middle may lie close together by chance, this std is the steadier one; and it knows how far
    a branch's scores of good images scatter at the far end, where branches are compared.
    """
    validation = _usable(validation)
    std = float(validation.std())
    return float(validation.mean()), std if std > std_floor else 1.0


def fit_upper_z(validation: np.ndarray, std_floor: float = 0.0) -> tuple[float, float]:
    """Median, and as the std by how much the 90 % quantile is larger, in the normal distribution's units, but at least half the
    std of all scores; arguments and errors as of `fit_trimmed_z`.

    Of held-out images a few lie far out, where what was fitted to the others has to extrapolate. They would make the std larger,
    and anomalies smaller, than all the others let one expect.
    """
    validation = _usable(validation)
    median, upper = np.quantile(validation, (0.5, UPPER))
    std = max(float(upper - median) / UPPER_Z, float(validation.std()) / 2)
    return float(median), std if std > std_floor else 1.0


def _usable(validation: np.ndarray) -> np.ndarray:
    validation = np.asarray(validation, dtype=np.float64)
    if validation.size == 0 or not np.isfinite(validation).all():
        raise ValueError("normalisation needs at least one validation score, and all of them finite")
    return validation


def fit_normalisation(
    validation: np.ndarray, branch: str, rule: str, std_floor: float = 0.0
) -> tuple[float, float]:
    """By what a branch's scores are normalised before they are added: trimmed z (sum), or (softplus) z by all scores of good
    images, less the branch's dead zone, times its sharpness, so that what good images reach adds next to nothing."""
    if rule == "softplus":
        mean, std = (fit_upper_z if BRANCHES[branch].held_out else fit_z)(validation, std_floor)
        return mean + BRANCHES[branch].dead_zone * std, std / BRANCHES[branch].sharpness
    return fit_trimmed_z(validation, std_floor)


def apply_z(scores: np.ndarray, mean: float, std: float) -> np.ndarray:
    """(score - mean) / std in float64."""
    return (np.asarray(scores, dtype=np.float64) - mean) / std


def contribution(normalised: np.ndarray, rule: str) -> np.ndarray:
    """What a branch's normalised scores (n,) add to the fused ones: themselves (sum), or log(1 + exp z) (softplus)."""
    return np.logaddexp(0, normalised) if rule == "softplus" else normalised


def before_softplus(contributions: np.ndarray) -> np.ndarray:
    """The normalised scores that add so much by the rule softplus, at weight 1: z of log(1 + exp z), down to -69."""
    added = np.maximum(np.asarray(contributions, np.float64), 1e-30)
    return added + np.log(-np.expm1(-added))


def fuse(scores: Mapping[str, np.ndarray], weights: Mapping[str, float], rule: str) -> np.ndarray:
    """The weighted sum of the branches' contributions, (n,); a branch without a weight is left out."""
    return np.sum([weight * contribution(scores[branch], rule) for branch, weight in weights.items()], axis=0)


def fused_map(branch_maps: np.ndarray, contributions: np.ndarray, rule: str) -> np.ndarray:
    """The sum of the branches' maps, brought closer to each other in height (docs/beyond.md, fusion).

    Args:
        branch_maps: (N, K, h, w), scaled so that of good images' values 0.5 % lie over 1; what lies below 0 is taken as 0.
        contributions: (N, K), each branch's weight times its `contribution`.

    Returns:
        (N, h, w): sum over branches of strength^0.1 times map / max(1, the map's maximum)^0.75. The strength is the contribution
        or, as a plain sum's may be negative, log(1 + exp of it).
    """
    positive = np.maximum(branch_maps, 0)
    strengths = contribution(contributions, "softplus") if rule == "sum" else contributions
    heights = strengths**STRENGTH_EXPONENT / np.maximum(positive.max((2, 3)), 1) ** MAXIMUM_EXPONENT
    return (positive * heights[:, :, None, None]).sum(1)
