"""How well label maps that know no class names agree with true ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class LabelMatch:
    """The best one-to-one matching of predicted labels to true classes."""

    mean_iou: float  # mean of ``per_class``, 0..1
    # True class -> intersection over union with its predicted label over all images; 0 where none is left for
    # it. Classes that occur in no true map are left out.
    per_class: dict[int, float]


def match_labels(predicted: Iterable[np.ndarray], true: Iterable[np.ndarray]) -> LabelMatch:
    """Match predicted labels to true classes, background included, so that the sum of the IoUs is largest.

    Args:
        predicted: label maps (H, W) uint8.
        true: as many class maps, each of the same size as its predicted one.

    Raises:
        ValueError: a different number of maps, or none, or two maps of different sizes.

    Example:
        >>> match_labels([np.array([[2, 2, 0]], np.uint8)], [np.array([[1, 1, 0]], np.uint8)]).mean_iou
        1.0
    """
    counts = np.zeros((256, 256), np.int64)  # true class x predicted label
    images = 0
    for labels, classes in zip(predicted, true, strict=True):
        if labels.shape != classes.shape:
            raise ValueError(f"predicted map {images} is {labels.shape}, the true one {classes.shape}")
        codes = classes.astype(np.int64).ravel() * 256 + labels.ravel()
        counts += np.bincount(codes, minlength=256 * 256).reshape(256, 256)
        images += 1
    if not images:
        raise ValueError("no label maps to match")
    present = np.flatnonzero(counts.sum(1))
    union = counts[present].sum(1)[:, None] + counts.sum(0) - counts[present]
    iou = counts[present] / np.maximum(union, 1)
    rows, columns = linear_sum_assignment(-iou)
    per_class = {int(present[row]): float(iou[row, column]) for row, column in zip(rows, columns)}
    return LabelMatch(float(np.mean(list(per_class.values()))), per_class)
