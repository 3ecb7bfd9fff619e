"""Trimmed z-scores: how the scores of different branches are made comparable (METHOD.md section 2, last paragraph)."""

from __future__ import annotations

import numpy as np

TRIMMED = (0.2, 0.8)  # quantiles between which a validation score counts
EXPORTED_STD_FLOOR = 1e-3  # in the exported model, a std up to this one counts as none


def fit_trimmed_z(validation: np.ndarray, std_floor: float = 0.0) -> tuple[float, float]:
    """Mean and std (divisor n) of the scores strictly between their 20 % and 80 % quantiles.

    Args:
        validation: scores of good images, (n,), n >= 1.
        std_floor: the std is taken as 1 where it is no larger than this; 0 for score files, `EXPORTED_STD_FLOOR`
            for the exported model.

    Returns:
        The two numbers for `apply_trimmed_z`. Where nothing lies strictly between the quantiles (all scores
        equal, or fewer than three), all scores count.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    validation = np.asarray(validation, dtype=np.float64)
    if validation.size == 0 or not np.isfinite(validation).all():
        raise ValueError("trimmed z needs at least one validation score, and all of them finite")
    low, high = np.quantile(validation, TRIMMED)
    kept = validation[(validation > low) & (validation < high)]
    if kept.size == 0:
        kept = validation
    std = float(kept.std())
    return float(kept.mean()), std if std > std_floor else 1.0


def apply_trimmed_z(scores: np.ndarray, mean: float, std: float) -> np.ndarray:
    """(score - mean) / std in float64."""
    return (np.asarray(scores, dtype=np.float64) - mean) / std
