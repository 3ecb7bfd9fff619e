"""Image-level metrics."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score


def auroc(good: np.ndarray, anomalous: np.ndarray) -> float:
    """Area under the ROC curve in percent of scores (n,) and (m,), higher = more anomalous; NaN where one is empty."""
    if not len(good) or not len(anomalous):
        return float("nan")
    labels = np.r_[np.zeros(len(good)), np.ones(len(anomalous))]
    return 100 * float(roc_auc_score(labels, np.r_[good, anomalous]))
