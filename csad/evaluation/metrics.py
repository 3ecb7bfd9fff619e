"""Image-level metrics, in percent; scores of good and of anomalous images, (n,) and (m,), higher = more anomalous.

All of them are NaN where one side is empty or a score is not finite: no order is known, so nothing is better than anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

# MVTec LOCO AD's categories.
LOCO = {"breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"}


def auroc(good: np.ndarray, anomalous: np.ndarray) -> float:
    """Area under the ROC curve."""
    from sklearn.metrics import roc_auc_score  # takes a second, and not every script measures

    return _percent(roc_auc_score, good, anomalous)


def average_precision(good: np.ndarray, anomalous: np.ndarray) -> float:
    """Mean precision over the recall steps."""
    from sklearn.metrics import average_precision_score

    return _percent(average_precision_score, good, anomalous)


def f1_max(good: np.ndarray, anomalous: np.ndarray) -> float:
    """F1 at the best of all thresholds."""
    from sklearn.metrics import precision_recall_curve

    def best(labels: np.ndarray, scores: np.ndarray) -> float:
        precision, recall, _ = precision_recall_curve(labels, scores)
        return np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))

    return _percent(best, good, anomalous)


def mean_known(values: Iterable[float | None]) -> float:
    """Mean of what is a number; NaN where nothing is."""
    measured = _known(values)
    return sum(measured) / len(measured) if measured else float("nan")


def counted(what: Mapping[str, Iterable[float | None]]) -> str:
    """How many values their means are of, where some were not measured: " (structural of 4 of 5)"; else nothing."""
    counts = [
        f"{name} of {len(_known(values))} of {len(values)}"
        for name, values in ((name, list(values)) for name, values in what.items())
        if len(_known(values)) < len(values)
    ]
    return f" ({', '.join(counts)})" if counts else ""


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def _percent(
    metric: Callable[[np.ndarray, np.ndarray], float], good: np.ndarray, anomalous: np.ndarray
) -> float:
    scores = np.r_[good, anomalous]
    if not len(good) or not len(anomalous) or not np.isfinite(scores).all():
        return float("nan")
    labels = np.r_[np.zeros(len(good)), np.ones(len(anomalous))]
    return 100 * float(metric(labels, scores))
